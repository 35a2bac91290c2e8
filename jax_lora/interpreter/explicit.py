"""Shardings as part of the types: JAX asks for those that it cannot infer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType, NamedSharding, PartitionSpec

if hasattr(jax.sharding, "auto_axes"):
    auto_axes = jax.sharding.auto_axes
else:  # older versions
    from jax.experimental.shard import (  # type: ignore[import-not-found,no-redef]
        auto_axes as auto_axes,
    )


def explicit_sharding(array: jax.Array) -> NamedSharding | None:
    """The sharding of an array, if shardings are part of the types of its mesh."""
    sharding = jax.typeof(array).sharding
    explicit = isinstance(sharding, NamedSharding) and not sharding.mesh.empty
    return sharding if explicit and AxisType.Explicit in sharding.mesh.axis_types else None


def spec_of(sharding: NamedSharding, ndim: int) -> tuple[Any, ...]:
    """The mesh axes along which each of an array's axes is split."""
    return (*sharding.spec, *[None] * (ndim - len(sharding.spec)))


def distinct(entries: Iterable[Any]) -> PartitionSpec:
    """A spec that splits along each mesh axis once, the first time."""
    used: set[str] = set()
    spec = []
    for entry in entries:
        names = set(entry) if isinstance(entry, tuple) else {entry} - {None}
        spec.append(None if names & used else entry)
        used |= names
    return PartitionSpec(*spec)


def split_like(out: jax.Array, fun: Callable[..., jax.Array], *args: jax.Array) -> jax.Array:
    """``fun(*args)``, split as ``out`` is.

    JAX infers few shardings of convolutions and ragged products, so where shardings are part of the
    types, those of what is in between are left to XLA.
    """
    return split_as(explicit_sharding(out), fun, *args)


def split_as(
    sharding: NamedSharding | None, fun: Callable[..., jax.Array], *args: Any
) -> jax.Array:
    """``fun(*args)`` with this sharding; without one, as it comes."""
    return fun(*args) if sharding is None else auto_axes(fun, out_sharding=sharding)(*args)


def look_up(fun: Callable[..., jax.Array], array: jax.Array, at: tuple[Any, ...]) -> jax.Array:
    """``fun(array, at)``, a lookup in an array that all examples share.

    Under `jax.vmap` over examples, the result is split along them as the indices are.
    """

    @custom_vmap
    def one(array: jax.Array, at: tuple[jax.Array, ...]) -> jax.Array:
        return fun(array, at)

    @one.def_vmap
    def many(size: int, batched: Any, array: jax.Array, at: Any) -> tuple[jax.Array, bool]:
        every = jax.vmap(fun, jax.tree.map(lambda flag: 0 if flag else None, tuple(batched)))
        split = (explicit_sharding(i) for i, flag in zip(at, batched[1], strict=True) if flag)
        sharding = next((s for s in split if s is not None), None)
        if sharding is not None:
            spec = PartitionSpec(*spec_of(sharding, 1)[:1])
            sharding = NamedSharding(sharding.mesh, spec)
        return split_as(sharding, every, array, at), True

    return one(array, at)
