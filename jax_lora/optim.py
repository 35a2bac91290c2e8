"""Optimizers that train an adapter's factors and nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax

from jax_lora.adapter import Adapter, Entry
from jax_lora.errors import AdapterError

TRAINED, FROZEN = "trained", "frozen"


def labels(tree: Any) -> Any:
    """Label every leaf: what an adapter trains ``"trained"``, all others ``"frozen"``.

    Args:
        tree: An adapter, or any tree that holds adapters, such as ``{"base": ..., "lora": ...}``.

    Returns:
        A tree of the same structure with a string for each leaf, for `optax.multi_transform`.

    Raises:
        AdapterError: There is no adapter in the tree.

    Example:
        >>> import jax.numpy as jnp, jax_lora as jl
        >>> layout = jl.Layout((2, 2), in_axes=(0,), out_axes=(1,))
        >>> factors = jl.LoraFactors(jnp.ones((2, 1)), jnp.ones((1, 2)), jnp.float32(1), layout)
        >>> tree = labels({"base": jnp.ones((2, 2)), "lora": jl.Adapter({"w": factors})})
        >>> tree["base"], tree["lora"]["w"].a, tree["lora"]["w"].scale
        ('frozen', 'trained', 'frozen')
    """

    def label(node: Any) -> Any:
        if not isinstance(node, Adapter):
            return FROZEN
        return Adapter({path: _marked(entry) for path, entry in node.items()})

    labelled = jax.tree.map(label, tree, is_leaf=lambda node: isinstance(node, Adapter))
    if TRAINED not in jax.tree.leaves(labelled):
        raise AdapterError(
            f"expected an adapter, or a tree with adapters in it, got {type(tree).__name__}: "
            "there is nothing to train"
        )
    return labelled


def _marked(entry: Entry) -> Any:
    marks: Any = {n: TRAINED if n in entry.TRAINED else FROZEN for n in entry.arrays()}
    return dataclasses.replace(entry, **marks)  # type: ignore[type-var]


def lora_optimizer(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """``optimizer`` for what an adapter trains; no update and no state for anything else.

    The masking is `optax.multi_transform` over `labels`, with `optax.set_to_zero` for what is
    frozen. Put gradient clipping and `optax.MultiSteps` *inside* ``optimizer``: around the result
    they would touch the gradients of frozen weights, which then have to be computed.

    Args:
        optimizer: Any optax transformation.

    Returns:
        A transformation for an adapter, or for a tree of base parameters and adapters.

    References:
        Hu et al. 2021, arXiv:2106.09685, section 4.1.
    """
    return optax.multi_transform({TRAINED: optimizer, FROZEN: optax.set_to_zero()}, labels)
