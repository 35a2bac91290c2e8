"""Where an adapter's arrays belong, given where the parameters are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jax_lora.adapter import Adapter, check_fits, leaves_by_path
from jax_lora.errors import AdapterError, expect_type, near_misses


def factor_spec(spec: Iterable[Any], labels: tuple[int, ...]) -> PartitionSpec:
    """The spec of a factor of a weight split as ``spec``: axis by axis as the weight, rank whole.

    Example:
        >>> tuple(factor_spec(PartitionSpec(None, "layers", "tp"), (1, -1, 2)))
        ('layers', None, 'tp')
    """
    known = dict(enumerate(spec))
    return PartitionSpec(*[known.get(i) for i in labels])


def adapter_shardings(adapter: Adapter, params: Any) -> Adapter:
    """The shardings of an adapter's arrays that follow from those of the parameters.

    An axis of ``a`` or ``b`` that is an axis of the weight is split as in the weight; the rank and
    ``scale`` are whole on every device. So no device holds a part of a factor that its part of the
    weight does not meet, and nothing of a weight's size moves because of the adapter.

    Args:
        adapter: The adapter, or its shapes, as of ``jax.eval_shape``. Axes in front of a factor's
            own, of many adapters in one, are whole.
        params: The parameters it is for, or a pytree with the sharding of each in its place.

    Returns:
        An adapter with a sharding in the place of every array: for ``jax.device_put``, and for the
        ``in_shardings`` and ``out_shardings`` of ``jax.jit``. They are on the default memory of the
        devices, also where the parameters are on the host's.

    Raises:
        AdapterError: Names every entry without a parameter, or with one whose sharding does not say
            how each axis is split, or is for fewer axes than the weight has.

    Example:
        >>> import jax.numpy as jnp, jax_lora as jl
        >>> mesh = jax.make_mesh((1,), ("tp",))
        >>> w = jax.device_put(jnp.ones((4, 6)), NamedSharding(mesh, PartitionSpec(None, "tp")))
        >>> params, x = {"w": w}, jnp.ones((2, 4))
        >>> plan = jl.plan(lambda p, x: x @ p["w"], params, x, config=jl.LoraConfig(rank=2))
        >>> draw = lambda: jl.init(jax.random.key(0), params, plan)
        >>> shardings = jl.adapter_shardings(jax.eval_shape(draw), params)
        >>> tuple(shardings["w"].a.spec), tuple(shardings["w"].b.spec)
        ((None, None), (None, 'tp'))
        >>> adapter = jax.jit(draw, out_shardings=shardings)()  # never whole on one device
    """
    expect_type("an adapter", adapter, Adapter)
    leaves = leaves_by_path(params)
    if all(hasattr(leaves.get(path), "shape") for path in adapter):
        check_fits(params, adapter)
    entries, problems = {}, []
    for path, entry in adapter.items():
        if path not in leaves:
            problems.append(f"{path}: no such parameter ({near_misses(path, leaves)})")
            continue
        sharding = getattr(leaves[path], "sharding", leaves[path])
        if problem := _problem(sharding, entry.shape):
            problems.append(f"{path}: {problem}")
        else:
            entries[path] = _of_entry(sharding, entry)
    if problems:
        raise AdapterError(
            "expected a NamedSharding for every adapted parameter; place the parameters with "
            "jax.device_put, or pass the tree of their shardings:\n  " + "\n  ".join(problems)
        )
    return Adapter(entries)


def _problem(sharding: Any, shape: tuple[int, ...]) -> str:
    """What is wrong with a weight's sharding; empty if nothing is."""
    if isinstance(sharding, NamedSharding):
        axes = len(sharding.spec)
        return f"{sharding.spec} is for {axes} axes, of {len(shape)}" if axes > len(shape) else ""
    if isinstance(sharding, PartitionSpec):
        return f"got {sharding} without a mesh; wrap it, NamedSharding(mesh, spec)"
    if not isinstance(sharding, Sharding):
        return f"got {type(sharding).__name__}"
    return "" if sharding.is_fully_replicated else f"got {sharding}, whose axes have no names"


def _of_entry(sharding: Sharding, entry: Any) -> Any:
    labels = entry.axes()

    def of(name: str, array: jax.Array) -> Any:
        if not isinstance(sharding, NamedSharding):  # one device, or the same on each
            return sharding
        axes = labels.get(name)
        more = 0 if axes is None else len(array.shape) - len(axes)
        spec = PartitionSpec(*[None] * more, *factor_spec(sharding.spec, axes or ()))
        return NamedSharding(sharding.mesh, spec)

    placed = {name: of(name, array) for name, array in entry.arrays().items()}
    return dataclasses.replace(entry, **placed)
