"""Smaller ranks are filled up with zeros, and that changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_lora as jl
from jax_lora.adapter import Layout
from jax_lora.optim import lora_optimizer
from jax_lora.sweep.stacking import check_padding, pad, stack, structure_of, trim, unstack, widest

STEPS, OWN, WIDE = 4, 2, 5
OPTIMIZERS = {
    "sgd": optax.sgd(0.001, momentum=0.9),
    "adamw": optax.adamw(0.05, weight_decay=0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.rmsprop(0.01)),
}
# Compiling takes longer than running here.
QUICK = {"xla_backend_optimization_level": 0}


def model(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w1"]) @ params["w2"]


@pytest.fixture(scope="module")
def arrays() -> Any:
    rng = np.random.default_rng(0)
    shapes = {"w1": (6, 7), "w2": (7, 5), "x": (4, 6), "y": (4, 5)}
    return {k: jnp.asarray(rng.normal(size=shape), jnp.float32) for k, shape in shapes.items()}


def fresh(params: Any, x: Any, rank: int, **settings: Any) -> jl.Adapter:
    config = jl.LoraConfig(rank=rank, alpha=2.0, scaling="alpha", targets="*", **settings)
    plan = jl.plan(model, params, x, config=config)
    # VeRA's vectors and others start at zero: here everything has a gradient from the first step.
    return jl.init(jax.random.key(0), params, plan)


VARIANTS = ("lora", "lora-fa", "dora", "vera", "loha", "lokr", "full")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {"variant": "lora"}) for name in OPTIMIZERS),
        *(("adamw", {"variant": variant}) for variant in VARIANTS[1:]),
        *(("sgd", {"init": init}) for init in ("pissa", "olora")),
    ],
    ids=lambda value: "".join(value.values()) if isinstance(value, dict) else value,
)
def test_zeros_stay_zero_and_change_nothing(
    arrays: Any, name: str, settings: dict[str, str], close: Callable[..., None]
) -> None:
    """The zeros exactly; the rest but for rounding, as sums have other lengths."""
    params, x = {k: arrays[k] for k in ("w1", "w2")}, arrays["x"]
    adapted, tx = jl.apply(model), jl.optim.lora_optimizer(OPTIMIZERS[name])

    def loss(adapter: jl.Adapter) -> jax.Array:
        return ((adapted(params, adapter, x) - arrays["y"]) ** 2).sum()

    def train(adapter: jl.Adapter) -> tuple[jl.Adapter, jax.Array]:
        def step(carry: Any, _: None) -> Any:
            adapter, state = carry
            value, grads = jax.value_and_grad(loss)(adapter)
            updates, state = tx.update(grads, state, adapter)
            return (optax.apply_updates(adapter, updates), state), value

        with jax.numpy_dtype_promotion("standard"):
            (adapter, _), losses = jax.lax.scan(step, (adapter, tx.init(adapter)), length=STEPS)
        return adapter, losses

    small = fresh(params, x, OWN, **settings)
    large = jax.eval_shape(lambda: fresh(params, x, WIDE, **settings))
    compiled = jax.jit(train, compiler_options=QUICK)
    trained, losses = compiled(pad(small, large))
    alone, expected = compiled(small)
    # Raises where a zero has moved.
    close(trim(trained, small), alone, rtol=1e-4)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[-1] < 0.99 * losses[0]
    if settings != {"variant": "full"}:
        sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (trained, alone)]
        assert sizes[0] > sizes[1]


def test_what_is_padded_is_trimmed(arrays: Any) -> None:
    params = {k: arrays[k] for k in ("w1", "w2")}
    adapters = [fresh(params, arrays["x"], rank) for rank in (1, 3, 2)]
    shapes = widest(adapters)
    assert {path: entry.a.shape for path, entry in shapes.items()} == {"w1": (6, 3), "w2": (7, 3)}
    stacked = stack([pad(adapter, shapes) for adapter in adapters])
    assert stacked["w1"].b.shape == (3, 3, 7)
    assert stacked["w1"].scale.shape == (3,)
    assert (stacked["w1"].a[0, :, 1:] == 0).all()
    for found, adapter in zip(unstack(stacked, 3), adapters, strict=True):
        trimmed = trim(found, adapter)
        for one, other in zip(*map(jax.tree.leaves, (trimmed, adapter)), strict=True):
            np.testing.assert_array_equal(one, other)


def test_what_moved_is_not_trimmed(arrays: Any) -> None:
    params = {k: arrays[k] for k in ("w1", "w2")}
    small, large = (fresh(params, arrays["x"], rank) for rank in (1, 2))
    padded = pad(small, large)
    with pytest.raises(jl.ConfigError, match="they have moved"):
        trim(jax.tree.map(lambda leaf: leaf + 1e-30, padded), small)
    # What has diverged is not finite in the zeros either, and is reported as that.
    trim(jax.tree.map(lambda leaf: leaf * jnp.nan, padded), small)


def test_what_has_one_structure(arrays: Any) -> None:
    params, x = {k: arrays[k] for k in ("w1", "w2")}, arrays["x"]
    lora = structure_of(fresh(params, x, 1))
    assert lora == structure_of(fresh(params, x, 3, init="gaussian"))
    others = ({"variant": "dora"}, {"init": "pissa"}, {"dtype": "bfloat16"}, {"exclude": ("w1",)})
    assert len({lora, *(structure_of(fresh(params, x, 1, **other)) for other in others)}) == 5


@pytest.mark.parametrize(
    ("optimizer", "fits"),
    [
        (optax.sgd(0.1, momentum=0.9), True),
        (optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)), True),
        (optax.adafactor(0.1), False),  # averages over an array's elements
        (optax.chain(optax.clip_by_block_rms(0.01), optax.sgd(0.1)), False),
    ],
)
def test_an_optimizer_that_counts_zeros_is_refused(
    optimizer: optax.GradientTransformation, fits: bool
) -> None:
    layout = Layout((4, 3), (0,), (1,))
    small, large = (
        jl.Adapter(
            {
                "w": jl.LoraFactors(
                    np.zeros((4, r), np.float32),
                    np.zeros((r, 3), np.float32),
                    np.float32(1),
                    layout,
                )
            }
        )
        for r in (1, 2)
    )
    if fits:
        check_padding(lora_optimizer(optimizer), small, large)
        return
    with pytest.raises(jl.ConfigError, match="moves others otherwise"):
        check_padding(lora_optimizer(optimizer), small, large)
