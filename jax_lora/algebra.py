"""Pure functions on adapters and parameters; the arguments are never changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from jax_lora.adapter import (
    Adapter,
    Entry,
    check_fits,
    check_plain,
    leaves_by_path,
    path_of,
    real_array,
)
from jax_lora.errors import AdapterError, ConfigError, expect_type
from jax_lora.lowrank import product, working_dtype
from jax_lora.rules import matching_paths
from jax_lora.variants import factor_matrices
from jax_lora.virtual import LoraWeight


def merge(params: Any, adapter: Adapter) -> Any:
    """Fold an adapter into its base: ``W + scale * a b``, or what else its variant makes of ``W``.

    Args:
        params: The base parameters.
        adapter: The adapter.

    Returns:
        A new tree like ``params``, of the same shapes and dtypes, for the unadapted function. The
        sum is formed in the wider of the weight's and the factors' dtype and rounded once.

    Raises:
        AdapterError: The adapter does not fit the parameters, or is one with dropout.

    Example:
        >>> import jax.numpy as jnp, jax_lora as jl
        >>> layout = jl.Layout((2, 2), in_axes=(0,), out_axes=(1,))
        >>> factors = jl.LoraFactors(jnp.ones((2, 1)), jnp.ones((1, 2)), jnp.float32(0.5), layout)
        >>> merge({"w": jnp.zeros((2, 2))}, jl.Adapter({"w": factors}))["w"].tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    check_plain(adapter)
    check_fits(params, adapter)

    def fold(key_path: Any, leaf: Any) -> Any:
        path = path_of(key_path)
        if path not in adapter:
            return leaf
        return _formed(adapter[path], leaf, path)

    return jax.tree_util.tree_map_with_path(fold, params)


def unmerge(params: Any, adapter: Adapter) -> Any:
    """Take a merged adapter out again: ``W' - scale * a b`` for every adapted weight.

    The article switches tasks this way: subtract ``B A``, add ``B' A'``. Every such switch rounds
    each weight twice, and as it starts from what the last one left, the errors add up: after n
    switches to at most ``2 n u max|W|``, with ``u = 2^-24`` in float32, and in the tests to a
    hundred times the error of one switch after a thousand.
    Switching from a kept base has no history: `merge` another adapter into it, or pass another one
    to the adapted function, and the thousandth switch has the bits of the first, one rounding away
    from the exact sum.

    Args:
        params: Parameters with ``adapter`` merged into them.
        adapter: The adapter.

    Returns:
        A new tree like ``params``.

    Raises:
        AdapterError: The adapter does not fit the parameters, or has entries (DoRA, trained values)
            that leave no way back: keep the base.

    Example:
        >>> import jax.numpy as jnp, jax_lora as jl
        >>> layout = jl.Layout((2, 2), in_axes=(0,), out_axes=(1,))
        >>> factors = jl.LoraFactors(jnp.ones((2, 1)), jnp.ones((1, 2)), jnp.float32(0.5), layout)
        >>> unmerge({"w": jnp.full((2, 2), 0.5)}, jl.Adapter({"w": factors}))["w"].tolist()
        [[0.0, 0.0], [0.0, 0.0]]
    """
    return merge(params, negate(adapter))


def delta(adapter: Adapter, params: Any = None) -> dict[str, jax.Array]:
    """The updates themselves by path: ``dW = W' - W``, ``scale * a b`` with LoRA.

    The laws of the algebra hold on these: factors ``a`` and ``b`` of the same update are many.

    Args:
        adapter: The adapter.
        params: The base parameters, needed where the update depends on them (DoRA, trained values).

    Returns:
        By path, an array of the weight's shape, in the factors' dtype and at least float32.

    Raises:
        AdapterError: Factors that do not have the shapes of their layout, or an update that depends
            on parameters that are not given.

    Example:
        >>> import jax.numpy as jnp, jax_lora as jl
        >>> layout = jl.Layout((2, 3), in_axes=(1,), out_axes=(0,))
        >>> factors = jl.LoraFactors(jnp.ones((3, 1)), jnp.ones((1, 2)), jnp.float32(2), layout)
        >>> delta(jl.Adapter({"w": factors}))["w"].tolist()
        [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
    """
    check_plain(adapter)
    if params is not None:
        check_fits(params, adapter)
    leaves = {} if params is None else leaves_by_path(params)
    updates = {}
    for path, entry in adapter.items():
        if entry.LINEAR or path not in leaves:
            a, b = factor_matrices(path, entry)
            updates[path] = entry.layout.weight(product(a, b))
        else:
            dtypes = (x.dtype for x in entry.trained().values())
            w = leaves[path].astype(working_dtype(leaves[path].dtype, *dtypes))
            updates[path] = _formed(entry, w, path) - w
    return updates


def _formed(entry: Entry, w: jax.Array, path: str) -> jax.Array:
    """The adapted parameter as an ordinary array."""
    new = entry.virtual(w, path)
    return new.materialize() if isinstance(new, LoraWeight) else new


def scale(adapter: Adapter, factor: float | jax.Array) -> Adapter:
    """Strengthen or weaken an adapter: ``factor * dW``; 0 switches it off.

    Only the ``scale`` leaves change, so a function compiled for the adapter serves the result.

    Args:
        adapter: The adapter.
        factor: A number or a scalar array, of which the result is a differentiable function. For
            an adapter with a leading axis of size K it may have the shape ``[K]``.

    Returns:
        A new adapter with the same ``a`` and ``b``.

    Raises:
        ConfigError: The factor is no real number, or has a shape that would change that of a
            ``scale``.
        AdapterError: An update that is not in proportion to its scale (DoRA, trained values).

    Example:
        >>> import jax.numpy as jnp, jax_lora as jl
        >>> layout = jl.Layout((2, 3), in_axes=(0,), out_axes=(1,))
        >>> factors = jl.LoraFactors(jnp.ones((2, 1)), jnp.ones((1, 3)), jnp.float32(2), layout)
        >>> float(scale(jl.Adapter({"w": factors}), 0.25)["w"].scale)
        0.5
    """
    check_plain(adapter)
    value = real_array("the factor", factor)

    def scaled(path: str, factors: Any) -> Any:
        _check_proportional(path, factors)
        shape = tuple(factors.scale.shape)
        if value.shape not in ((), shape):
            raise ConfigError(
                f"expected a scalar factor or one of shape {shape}, that of the scale of {path}; "
                f"got shape {value.shape}; to make many adapters of one, use jax.vmap"
            )
        return dataclasses.replace(factors, scale=factors.scale * value.astype(factors.scale.dtype))

    return Adapter({path: scaled(path, factors) for path, factors in adapter.items()})


def negate(adapter: Adapter) -> Adapter:
    """The opposite adapter: ``-dW``, to forget what the adapter does (task arithmetic).

    Args:
        adapter: The adapter.

    Returns:
        A new adapter with the same ``a`` and ``b`` and the opposite ``scale``.

    Raises:
        AdapterError: An update that is not in proportion to its scale (DoRA, trained values).

    Example:
        >>> import jax.numpy as jnp, jax_lora as jl
        >>> layout = jl.Layout((2, 3), in_axes=(0,), out_axes=(1,))
        >>> factors = jl.LoraFactors(jnp.ones((2, 1)), jnp.ones((1, 3)), jnp.float32(2), layout)
        >>> float(negate(jl.Adapter({"w": factors}))["w"].scale)
        -2.0

    References:
        Ilharco et al. 2022, Editing Models with Task Arithmetic, arXiv:2212.04089.
    """
    check_plain(adapter)
    for path, entry in adapter.items():
        _check_proportional(path, entry)
    opposite: dict[str, Any] = dict(adapter)
    for path, entry in opposite.items():
        opposite[path] = dataclasses.replace(entry, scale=-entry.scale)
    return Adapter(opposite)


def _check_proportional(path: str, entry: Entry) -> None:
    if not entry.LINEAR:
        raise AdapterError(
            f"{path}: expected an update in proportion to its scale, got that of {entry}, which "
            "depends on the parameter too; use combine([adapter], [factor], params=params), or "
            "drop the path"
        )


def select(adapter: Adapter, globs: str | Sequence[str]) -> Adapter:
    """The part of an adapter whose paths at least one glob matches.

    Args:
        adapter: The adapter.
        globs: One or more globs over parameter paths, as in `LoraConfig`.

    Returns:
        A new adapter of the same entries, in the order of their paths.

    Raises:
        TargetError: A glob that matches nothing, with the nearest paths.
        ConfigError: What is no glob.

    Example:
        >>> import jax.numpy as jnp, jax_lora as jl
        >>> layout = jl.Layout((2, 3), in_axes=(0,), out_axes=(1,))
        >>> factors = jl.LoraFactors(jnp.ones((2, 1)), jnp.ones((1, 3)), jnp.float32(2), layout)
        >>> adapter = jl.Adapter({"l1/kernel": factors, "l2/kernel": factors})
        >>> list(select(adapter, "l1/*")), list(drop(adapter, "l1/*"))
        (['l1/kernel'], ['l2/kernel'])
    """
    expect_type("an adapter", adapter, Adapter)
    matched = matching_paths(globs, adapter)
    return Adapter({path: factors for path, factors in adapter.items() if path in matched})


def drop(adapter: Adapter, globs: str | Sequence[str]) -> Adapter:
    """The part of an adapter whose paths no glob matches; the rest of `select`.

    Args:
        adapter: The adapter.
        globs: One or more globs over parameter paths, as in `LoraConfig`.

    Returns:
        A new adapter of the same entries. Without any it is still an adapter, that of the base.

    Raises:
        TargetError: A glob that matches nothing, with the nearest paths.
        ConfigError: What is no glob.
    """
    expect_type("an adapter", adapter, Adapter)
    matched = matching_paths(globs, adapter)
    return Adapter({path: factors for path, factors in adapter.items() if path not in matched})
