"""Writes the golden checkpoints of the format version that this library has.

    python tests/golden/make.py tests/golden/v3

Of each version they were written once, by the last commit that had it, and are never written again:
what they show is that they can still be read. `tests/io/test_golden.py` says what is in them.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_lora as jl


def counted(shape: tuple[int, ...], dtype: str = "float32") -> jax.Array:
    """``0, 1/8, 2/8, ...`` in the order of the elements."""
    return jnp.asarray(np.arange(np.prod(shape, dtype=int)).reshape(shape) / 8, dtype)


def base() -> dict[str, jax.Array]:
    """Parameters that the adapter fits."""
    return {
        "dense": counted((4, 3)),
        "stack": counted((2, 3, 2), "bfloat16"),
        "bias": counted((3,)),
    }


def adapter() -> jl.Adapter:
    """Two variants, in two dtypes."""
    dense = jl.Layout((4, 3), in_axes=(0,), out_axes=(1,))
    stack = jl.Layout((2, 3, 2), in_axes=(1,), out_axes=(2,), stack_axes=(0,))
    a, b = counted((2, 3, 1), "bfloat16"), counted((2, 1, 2), "bfloat16")
    return jl.Adapter(
        {
            "dense": jl.DoraFactors(
                counted((4, 2)),
                counted((2, 3)),
                jnp.float32(0.5),
                dense,
                magnitude=counted((3,)),
                base_norm=counted((3,)),
            ),
            "stack": jl.LoraFactors(a, b, jnp.float32(2), stack),
        }
    )


CONFIG = jl.LoraConfig(
    rank=1, alpha=2, targets=(jl.Rule("dense", variant="dora", rank=2, alpha=1), "stack")
)


def optimizer() -> optax.GradientTransformation:
    """One with a state."""
    return jl.optim.lora_optimizer(optax.sgd(0.1, momentum=0.5))


def main(folder: Path) -> None:
    """Write them into a new folder."""
    if not hasattr(jl.io, "Checkpoints"):  # until version 2
        jl.io.save_adapter(folder / "adapter", adapter(), CONFIG, {"by": "make.py"})
        return
    jl.io.save_adapter(folder / "adapter", adapter(), CONFIG, {"by": "make.py"}, base())
    state = jax.tree.map(lambda x: x + 1, optimizer().init(adapter()))
    with jl.io.Checkpoints(folder / "training", base=base(), config=CONFIG) as saved:
        saved.save(
            7,
            adapter(),
            state,
            position=jl.io.Position(epoch=1, step=2, batch_size=8, examples=40),
            keys={"run": jax.random.key(3)},
            metrics={"accuracy": 0.25},
            metadata={"by": "make.py"},
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
