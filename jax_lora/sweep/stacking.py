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

from jax_lora.adapter import Adapter
from jax_lora.errors import ConfigError


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
        raise ConfigError(
            "expected an optimizer that leaves alone what has no gradient, as the zeros that fill "
            "up smaller ranks; they have moved, so that it is not the run of the rank alone: sweep "
            "each rank in a program of its own, Settings(pad=1)"
        )
    return jax.tree.map(jnp.asarray, trimmed)


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
