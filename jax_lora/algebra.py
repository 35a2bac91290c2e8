"""Pure functions on adapters and parameters; the arguments are never changed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jax_lora.adapter import Adapter, check_fits, path_of
from jax_lora.virtual import virtual_weight


def merge(params: Any, adapter: Adapter) -> Any:
    """Fold an adapter into its base: ``W + scale * a b`` for every adapted weight.

    Args:
        params: The base parameters.
        adapter: The adapter.

    Returns:
        A new tree like ``params``, of the same shapes and dtypes, for the unadapted function. The
        sum is formed in the wider of the weight's and the factors' dtype and rounded once.

    Raises:
        AdapterError: The adapter does not fit the parameters.

    Example:
        >>> import jax.numpy as jnp, jax_lora as jl
        >>> layout = jl.Layout((2, 2), in_axes=(0,), out_axes=(1,))
        >>> factors = jl.LoraFactors(jnp.ones((2, 1)), jnp.ones((1, 2)), jnp.float32(0.5), layout)
        >>> merge({"w": jnp.zeros((2, 2))}, jl.Adapter({"w": factors}))["w"].tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    check_fits(params, adapter)

    def fold(key_path: Any, leaf: Any) -> Any:
        path = path_of(key_path)
        if path not in adapter:
            return leaf
        return virtual_weight(leaf, adapter[path], path).materialize()

    return jax.tree_util.tree_map_with_path(fold, params)


def unmerge(params: Any, adapter: Adapter) -> Any:
    """Take a merged adapter out again: ``W' - scale * a b`` for every adapted weight.

    The article switches tasks this way: subtract ``B A``, add ``B' A'``. Every such switch rounds,
    so the base comes back only to rounding error. To switch exactly, keep the base and pass another
    adapter to the adapted function, or `merge` another one into the kept base.

    Args:
        params: Parameters with ``adapter`` merged into them.
        adapter: The adapter.

    Returns:
        A new tree like ``params``.

    Raises:
        AdapterError: The adapter does not fit the parameters.
    """
    negative = {path: dataclasses.replace(f, scale=-f.scale) for path, f in adapter.items()}
    return merge(params, Adapter(negative))
