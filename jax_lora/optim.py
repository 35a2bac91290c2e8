"""Optimizers that train an adapter's factors and nothing else."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import optax

from jax_lora.adapter import Adapter, Entry
from jax_lora.errors import AdapterError, ConfigError

TRAINED, FROZEN = "trained", "frozen"
#: With LoRA+: what is trained with the larger learning rate.
FASTER = "faster"
#: Trained arrays that are no such: factors that meet a weight's inputs, and whole values and rows.
_SLOWER = frozenset({"a", "a1", "a2", "c", "value"})


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
    return _labelled(tree, lambda name: TRAINED)


def lora_plus_labels(tree: Any) -> Any:
    """Label every leaf: ``"trained"``, ``"faster"`` or ``"frozen"``, as `lora_plus` has it.

    Args:
        tree: An adapter, or any tree that holds adapters.

    Returns:
        A tree of the same structure with a string for each leaf, for `optax.multi_transform`.

    Raises:
        AdapterError: There is no adapter in the tree.
    """
    return _labelled(tree, lambda name: TRAINED if name in _SLOWER else FASTER)


def _labelled(tree: Any, label_of: Callable[[str], str]) -> Any:
    def marked(entry: Entry) -> Any:
        names = entry.arrays()
        marks: Any = {n: label_of(n) if n in entry.TRAINED else FROZEN for n in names}
        return dataclasses.replace(entry, **marks)  # type: ignore[type-var]

    def label(node: Any) -> Any:
        if not isinstance(node, Adapter):
            return FROZEN
        return Adapter({path: marked(entry) for path, entry in node.items()})

    labelled = jax.tree.map(label, tree, is_leaf=lambda node: isinstance(node, Adapter))
    if not {TRAINED, FASTER} & set(jax.tree.leaves(labelled)):
        raise AdapterError(
            f"expected an adapter, or a tree with adapters in it, got {type(tree).__name__}: "
            "there is nothing to train"
        )
    return labelled


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
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ConfigError(
            "expected an optax transformation such as optax.adam(1e-3), got "
            f"{type(optimizer).__name__}"
        )
    return optax.multi_transform({TRAINED: optimizer, FROZEN: optax.set_to_zero()}, labels)


def lora_plus(
    make: Callable[[Any], optax.GradientTransformation],
    learning_rate: Any,
    ratio: float = 16.0,
) -> optax.GradientTransformation:
    """LoRA+: ``b`` is trained with a learning rate ``ratio`` times that of ``a``.

    What the paper finds for Adam-like optimizers, at large width n: ``a``, which sums over n
    inputs, needs a learning rate in proportion to ``1/n``, and ``b``, which sums over the rank, one
    that does not fall with n. By this what is trained in other variants is divided too:

    ========================  ======================  ============================
    variant                   ``learning_rate``       ``ratio * learning_rate``
    ========================  ======================  ============================
    LoRA, PiSSA, OLoRA        ``a``                   ``b``
    LoRA-FA                                           ``b``
    DoRA                      ``a``                   ``b``, ``magnitude``
    VeRA                                              ``d``, ``g``
    LoHa                      ``a1``, ``a2``          ``b1``, ``b2``
    LoKr                      ``c``, ``a``            ``b``
    whole values, rows        ``value``
    ========================  ======================  ============================

    Vectors that act on single outputs sum over nothing, so they go with ``b``; PEFT has it so too.
    Of parameters that are trained whole the paper does not speak.

    Args:
        make: A learning rate to an optimizer: ``optax.adam``, or ``lambda rate: optax.chain(...)``.
            It is called twice; clipping by a global norm inside it is by the norm of each group.
        learning_rate: A number or an optax schedule.
        ratio: What the learning rate is multiplied with; the paper recommends about 16 (2^4).

    Returns:
        A transformation for an adapter, or for a tree of base parameters and adapters. What is not
        trained has no update and no state.

    Raises:
        ConfigError: A ratio that is not a positive number.

    Example:
        >>> import jax.numpy as jnp, jax_lora as jl
        >>> layout = jl.Layout((2, 2), in_axes=(0,), out_axes=(1,))
        >>> factors = jl.LoraFactors(jnp.ones((2, 1)), jnp.ones((1, 2)), jnp.float32(1), layout)
        >>> adapter = jl.Adapter({"w": factors})
        >>> optimizer = lora_plus(optax.sgd, learning_rate=0.5, ratio=4.0)
        >>> updates, _ = optimizer.update(adapter, optimizer.init(adapter), adapter)
        >>> print(updates["w"].a[0], updates["w"].b[:, 0], updates["w"].scale)
        [-0.5] [-2.] 0.0

    References:
        Hayou et al. 2024, LoRA+: Efficient Low Rank Adaptation of Large Models, arXiv:2402.12354.
    """
    number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
    if not number or not 0 < ratio < math.inf:
        raise ConfigError(f"expected the ratio of learning rates to be positive, got {ratio!r}")
    if not callable(make):
        raise ConfigError(
            "expected what makes an optax transformation of a learning rate, such as optax.adam, "
            f"got {type(make).__name__}"
        )
    faster: Any
    if callable(learning_rate):

        def faster(count: Any) -> Any:
            return ratio * learning_rate(count)

    else:
        faster = ratio * learning_rate
    optimizers = {TRAINED: make(learning_rate), FASTER: make(faster), FROZEN: optax.set_to_zero()}
    return optax.multi_transform(optimizers, lora_plus_labels)
