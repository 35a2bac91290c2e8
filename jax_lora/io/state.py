"""The state of a training as flat trees of arrays, and back into the structure it came from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jax_lora.adapter import Adapter, leaves_by_path
from jax_lora.sharding import adapter_shardings

#: The names of PRNG implementations, by the path of a typed key.
Impls = dict[str, str]


def pack(tree: Any) -> tuple[dict[str, Any], Impls]:
    """A tree's arrays by path, and the implementations of those that are typed PRNG keys.

    Of a key its data is stored. What has no elements is left out.

    Example:
        >>> import optax
        >>> state = optax.sgd(0.1, momentum=0.9).init({"w": jnp.ones(3)})
        >>> {path: array.shape for path, array in pack(state)[0].items()}
        {'0/trace/w': (3,)}
        >>> pack({"dropout": jax.random.key(0)})[1]
        {'dropout': 'threefry2x32'}
    """
    leaves = {path: x for path, x in leaves_by_path(tree).items() if np.size(x)}
    impls = {path: str(jax.random.key_impl(x)) for path, x in leaves.items() if _is_key(x)}
    return {p: jax.random.key_data(x) if p in impls else x for p, x in leaves.items()}, impls


def unpack(example: Any, arrays: Mapping[str, Any], impls: Impls) -> Any:
    """The inverse of `pack`: a tree of the example's structure with these arrays.

    Where the example has no elements, what it has is taken. Check with `mismatches` first.
    """
    unpacked = {path: jax.random.wrap_key_data(arrays[path], impl=i) for path, i in impls.items()}
    leaves = [
        (unpacked.get(path, arrays[path]) if path in arrays else jnp.zeros(leaf.shape, leaf.dtype))
        for path, leaf in leaves_by_path(example).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(example), leaves)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def mismatches(
    example: Any, saved: Mapping[str, Any], impls: Impls, parts: Container[str] = ()
) -> list[str]:
    """In what a tree that was packed is not one of the example's structure and shapes.

    Args:
        example: The tree that is expected, or its shapes.
        saved: The shape and the dtype of each array that was packed, ``{"shape":, "dtype":}``.
        impls: As `pack` returned them.
        parts: The paths that the parts of an optimizer's state end with, which are named together.

    Returns:
        One line for each difference.
    """
    keys: Impls = {}

    def packed(tree: Any) -> dict[str, Any]:
        arrays, impls = pack(tree)
        keys.update(impls)
        return arrays

    shapes = jax.eval_shape(packed, example)
    now = {path: _kind(x.dtype, x.shape) for path, x in shapes.items()}
    then = {path: _kind(x["dtype"], x["shape"]) for path, x in saved.items()}
    lines = []
    for when, more, fewer in (("saved", then, now), ("now", now, then)):
        groups = Counter(_without_part(path, parts) for path in more if path not in fewer)
        lines += [f"{name}: only {when}, {_arrays(count)}" for name, count in groups.items()]
    lines += [
        f"{path}: saved {then[path]}, now {now[path]}"
        for path in now
        if path in then and then[path] != now[path]
    ]
    return lines + [
        f"{path}: saved a key of {impls.get(path)}, now of {keys.get(path)}"
        for path in sorted({*keys, *impls})
        if path in now and path in then and keys.get(path) != impls.get(path)
    ]


def _kind(dtype: Any, shape: Iterable[int]) -> str:
    return f"{dtype}{list(shape)}"


def _arrays(count: int) -> str:
    return "an array" if count == 1 else f"{count} arrays"


def part_of(path: str, parts: Container[str]) -> str | None:
    """The longest of ``parts`` that a path ends with: the array that it is the state of.

    Example:
        >>> part_of("0/mu/params/l1/kernel/a", {"params/l1/kernel/a", "kernel/a", "b"})
        'params/l1/kernel/a'
    """
    names = path.split("/")
    ends = ("/".join(names[k:]) for k in range(len(names)))
    return next((end for end in ends if end in parts), None)


def _without_part(path: str, parts: Container[str]) -> str:
    part = part_of(path, parts)
    return path if part is None else path.removesuffix(part).rstrip("/") or path


def shardings_of(trained: Any, base: Any) -> dict[str, Sharding]:
    """Where each array of ``trained`` belongs, by path; those on the default device are left out.

    That of an adapter follows from its base, as `adapter_shardings` has it; other trees are where
    their example is. Only what is spread over devices by a mesh has a place that matters.
    """
    places = trained
    if isinstance(trained, Adapter):
        over_mesh = any(_mesh_sharding(leaf) for leaf in jax.tree.leaves(base))
        places = adapter_shardings(trained, base) if over_mesh else None
    found = {path: _mesh_sharding(x) for path, x in leaves_by_path(places).items()}
    return {path: sharding for path, sharding in found.items() if sharding is not None}


def _mesh_sharding(leaf: Any) -> NamedSharding | None:
    sharding = leaf if isinstance(leaf, Sharding) else getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def place(
    arrays: Mapping[str, Any], shapes: Mapping[str, Any], shardings: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Put arrays on their devices: as the array whose state they are, or whole on every device.

    Args:
        arrays: Arrays by path: trained ones, or those of an optimizer's state.
        shapes: The shapes of the trained arrays by path.
        shardings: Where these belong, from `shardings_of`; empty for the default device.
    """

    def sharding(path: str, array: Any) -> Any:
        part = part_of(path, shapes)
        if part is not None and tuple(shapes[part]) == tuple(array.shape) and part in shardings:
            return shardings[part]
        mesh = next(iter(shardings.values())).mesh
        return NamedSharding(mesh, PartitionSpec())

    if not shardings:
        return {path: jnp.asarray(array) for path, array in arrays.items()}
    return {path: jax.device_put(x, sharding(path, x)) for path, x in arrays.items()}
