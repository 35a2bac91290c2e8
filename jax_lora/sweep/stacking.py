"""Many adapters as one with a leading axis, whatever their ranks.

A smaller rank is filled up with zeros. Each zero's gradient is the product of another one with
something, so it is exactly zero, and an optimizer that moves nothing without a gradient leaves it
where it is: the update ``dW`` is that of the true rank from the first step to the last.

All of this is done on the host, with nothing to compile.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_lora.adapter import Adapter
from jax_lora.errors import ConfigError

#: Of an update's largest element: what sums of other lengths may differ by, also in bfloat16.
_ROUNDING = 1e-2


def structure_of(adapter: Adapter) -> Hashable:
    """What adapters have in common that differ in their ranks and values alone."""
    leaves, treedef = jax.tree.flatten(adapter)
    return treedef, tuple((leaf.ndim, leaf.dtype.name) for leaf in leaves)


def widest(adapters: Sequence[Adapter]) -> Adapter:
    """The shapes that the arrays of all of these adapters fit into."""

    def largest(*leaves: Any) -> jax.ShapeDtypeStruct:
        sizes = zip(*(leaf.shape for leaf in leaves), strict=True)
        return jax.ShapeDtypeStruct(tuple(map(max, sizes)), leaves[0].dtype)

    return jax.tree.map(largest, *adapters)


def pad(adapter: Adapter, shapes: Adapter) -> Adapter:
    """The adapter with zeros behind its arrays, up to some shapes."""

    def padded(leaf: Any, wide: Any) -> np.ndarray:
        more = [(0, m - n) for n, m in zip(leaf.shape, wide.shape, strict=True)]
        return np.pad(leaf, more) if more else np.asarray(leaf)

    return jax.tree.map(padded, adapter, shapes)


def trim(adapter: Adapter, shapes: Adapter) -> Adapter:
    """The adapter at its own rank again: the inverse of `pad`.

    Raises:
        ConfigError: What is cut off is not zero, of an adapter whose numbers are finite.
    """

    def cut(leaf: Any, own: Any) -> np.ndarray:
        return np.asarray(leaf)[tuple(slice(n) for n in own.shape)]

    trimmed = jax.tree.map(cut, adapter, shapes)
    before, after = (_nonzeros(tree) for tree in (adapter, trimmed))
    if before != after and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trimmed)):
        raise _not_alone("they have moved")
    return jax.tree.map(jnp.asarray, trimmed)


def check_padding(
    optimizer: optax.GradientTransformation, adapter: Adapter, shapes: Adapter
) -> None:
    """That an optimizer updates an adapter as it updates the same one with zeros behind its arrays.

    Tried with two steps of drawn gradients, small and large, for what depends on their size.

    Args:
        optimizer: The optimizer.
        adapter: An adapter that is smaller than the shapes.
        shapes: The shapes.

    Raises:
        ConfigError: It does not.
    """
    rng = np.random.default_rng(0)

    def drawn(scale: float) -> Adapter:
        def one(leaf: Any) -> np.ndarray:
            return (scale * rng.normal(size=leaf.shape)).astype(leaf.dtype)

        return jax.tree.map(one, adapter)

    gradients = [drawn(scale) for scale in (1e-2, 1e2)]

    @jax.jit
    def updates(adapter: Adapter, gradients: list[Adapter]) -> list[Adapter]:
        state, found = optimizer.init(adapter), []
        for gradient in gradients:
            update, state = optimizer.update(gradient, state, adapter)
            found.append(update)
        return found

    around = drawn(1.0)  # and not zeros as an adapter begins, which have no norm
    alone = updates(around, gradients)
    padded = updates(pad(around, shapes), [pad(gradient, shapes) for gradient in gradients])
    for own, other in zip(alone, padded, strict=True):
        for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(other), strict=True):
            cut = np.asarray(b)[tuple(slice(n) for n in a.shape)].astype(np.float64)
            a = np.asarray(a, np.float64)
            if np.abs(a - cut).max(initial=0) > _ROUNDING * np.abs(a).max(initial=0):
                raise _not_alone("with them it moves others otherwise")


def _not_alone(why: str) -> ConfigError:
    return ConfigError(
        "expected an optimizer that leaves alone what has no gradient, as the zeros that fill up "
        f"smaller ranks, and counts none of these; {why}, so that it is not the run of the rank "
        "alone: sweep each rank in a program of its own, Settings(pad=1)"
    )


def _nonzeros(tree: Any) -> list[int]:
    return [int(np.count_nonzero(leaf)) for leaf in jax.tree.leaves(tree)]


def stack(trees: Sequence[Any]) -> Any:
    """Trees of the same shapes as one with a leading axis."""

    def stacked(*leaves: Any) -> Any:
        return jnp.stack(leaves) if _is_key(leaves[0]) else np.stack(leaves)

    return jax.tree.map(stacked, *trees)


def unstack(tree: Any, count: int) -> list[Any]:
    """The first trees of `stack`."""
    host = jax.tree.map(lambda leaf: leaf if _is_key(leaf) else np.asarray(leaf), tree)
    return [jax.tree.map(lambda leaf, k=k: leaf[k], host) for k in range(count)]


def _is_key(leaf: Any) -> bool:
    """Whether an array is one of PRNG keys, which numpy does not know."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
