"""A small training for the tests of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_lora as jl

LAYOUT = jl.Layout((4, 3), in_axes=(0,), out_axes=(1,))
STACK = jl.Layout((2, 3, 4), in_axes=(1,), out_axes=(2,), stack_axes=(0,))
CONFIG = jl.LoraConfig(rank=2, targets=("**",))


def random(shape: tuple[int, ...], seed: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


def base(seed: int = 0) -> dict[str, Any]:
    return {"dense": {"w": random((4, 3), seed)}, "stack": random((2, 3, 4), seed, jnp.bfloat16)}


def adapter(seed: int = 0, rank: int = 2) -> jl.Adapter:
    def entry(layout: jl.Layout, dtype: Any = jnp.float32) -> jl.LoraFactors:
        a, b = random(layout.a_shape(rank), seed, dtype), random(layout.b_shape(rank), seed, dtype)
        return jl.LoraFactors(a, b, jnp.float32(1 / 3), layout)

    return jl.Adapter({"dense/w": entry(LAYOUT), "stack": entry(STACK, jnp.bfloat16)})


def adam() -> optax.GradientTransformation:
    return jl.optim.lora_optimizer(optax.adam(1e-3))


def adam_state(of: jl.Adapter, seed: int = 0) -> Any:
    """A state as after some steps."""
    state = adam().init(of)
    return jax.tree.map(lambda x: x + random(x.shape, seed).astype(x.dtype) + 3, state)


def saved(folder: Path, steps: Any = (10, 20), **options: Any) -> jl.io.Checkpoints:
    """Closed checkpoints of these steps; the adapter of step n has the seed n."""
    checkpoints = jl.io.Checkpoints(folder, **{"base": base(), "config": CONFIG} | options)
    with checkpoints:
        for step in steps:
            checkpoints.save(step, adapter(step), adam_state(adapter(step), step))
    return checkpoints


def same_bits(found: Any, expected: Any) -> bool:
    if jax.tree.structure(found) != jax.tree.structure(expected):
        return False
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return all(
        np.asarray(x).dtype == np.asarray(y).dtype
        and np.shape(x) == np.shape(y)
        and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in pairs
    )


def files_of(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
