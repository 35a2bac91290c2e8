"""`apply_bank`: any function of parameters, each example of a batch with an adapter of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.adapter import Adapter, path_of
from jax_lora.bank import Bank
from jax_lora.errors import AdapterError, ConfigError, expect_type
from jax_lora.interpreter import Interpreter
from jax_lora.interpreter.tokens import TokenAxes
from jax_lora.slots import Chosen
from jax_lora.transform import interpret, is_array, signature_with

#: Stands for no axis.
_SHARED = object()


def apply_bank(
    fun: Callable[..., Any],
    *,
    in_axes: Any = 0,
    out_axes: int = 0,
    token_axes: Any = None,
    strict: bool = False,
) -> Callable[..., Any]:
    """Make ``fun(params, ...)`` take a bank and ids: ``adapted(params, bank, ids, ...)``.

    Example ``i`` of the batch is computed with the adapter in slot ``ids[i]``, as ``x W + scale (x
    a) b`` with the factors of that slot; a negative id is the plain base. ``x W`` is one product
    for the whole batch. The factors are read where they are, and in the form that costs least for
    the sizes: see `jax_lora.interpreter.mixed`.

    The function is called on a batch of one, under `jax.vmap`, so it has to treat examples
    independently: what it draws from a key, or averages over a batch, it draws and averages for
    each example alone. Call the result under `jax.jit`; other ids, and other adapters in the bank,
    compile nothing.

    Args:
        fun: A pure function whose first argument is a pytree of parameters.
        in_axes: The axis of the examples in the arguments after the ids, as in `jax.vmap`: one
            integer for all, or a tree prefix of these arguments; None for what all examples share.
            Keyword arguments, and what is not an array, are shared.
        out_axes: The axis of the examples in every output. A scalar, such as a loss, becomes one
            number for each example.
        token_axes: With ids ``[batch, tokens]``, the axis of the tokens in the arguments, counted
            like ``in_axes``: one integer for all, or a tree prefix; None for arguments without.
        strict: Refuse to form any adapted weight that no rule can keep factored. Where one is
            formed, it is formed for each example.

    Returns:
        A function ``(params, bank, ids, *args, **kwargs)``. Its ids are integers ``[batch]``, such
        as those of ``bank.ids``, or ``[batch, tokens]``. It is differentiable in the bank: the
        gradient is zero for slots that no example selects. Under `jax.jit`, where ids have no
        values yet, one that is too high is the base's. Where each token selects an adapter,
        every product and lookup with an adapted weight has to be one for each token.

    Raises:
        AdapterError: From the returned function: the bank does not fit the parameters; ids of
            another kind; arguments or outputs without the axis of the examples; or JAX has no
            batching rule for what the function does, as for products of experts.
        MaterializeError: From the returned function: under ``strict``; or with an id for each
            token, where an adapted weight meets something that has no row for each token.
        ConfigError: Axes that are none of the arguments'.

    Example:
        >>> import jax, jax.numpy as jnp, jax_lora as jl
        >>> model = lambda params, x: x @ params["w"]
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
        >>> plan = jl.plan(model, params, x, config=jl.LoraConfig(rank=2))
        >>> adapter = jl.init(jax.random.key(0), params, plan)
        >>> bank = jl.Bank.empty(adapter, slots=4).add("mine", adapter)
        >>> y = jax.jit(jl.apply_bank(model))(params, bank, bank.ids(["mine", None]), x)
        >>> y.shape
        (2, 3)
    """

    @functools.wraps(fun)
    def adapted(params: Any, bank: Bank, ids: Any, *args: Any, **kwargs: Any) -> Any:
        expect_type("a bank", bank, Bank)
        slot = _slots(ids, bank.slots, token_axes)
        leaves, treedef = jax.tree.flatten(args)
        axes = _example_axes(in_axes, args, slot.shape[0])
        of_tokens = _token_axes(token_axes, args, slot.shape[1:])
        first = len(jax.tree.leaves(params))  # the arguments' leaves come after those
        outputs: list[Any] = []

        def one(slot: jax.Array, mapped: dict[int, jax.Array]) -> list[jax.Array]:
            alone = {k: jnp.expand_dims(x, axes[k]) for k, x in mapped.items()}
            args = jax.tree.unflatten(treedef, [alone.get(k, x) for k, x in enumerate(leaves)])
            adapter = Adapter({path: Chosen(bank.entries[path], slot) for path in bank.entries})
            tokens = None
            if slot.ndim:
                tokens = TokenAxes({first + k: i for k, i in of_tokens.items()}, slot.shape[0])
            interpreter = Interpreter(strict=strict, tokens=tokens)
            outputs[:] = jax.tree.flatten(
                interpret(interpreter, fun, params, adapter, args, kwargs)
            )
            return [_alone(out, out_axes) for out in outputs[0] if is_array(out)]

        try:
            arrays = jax.vmap(one, in_axes=(0, axes))(slot, {k: leaves[k] for k in axes})
        except NotImplementedError as error:
            raise AdapterError(
                f"expected a function that jax.vmap can map over examples; JAX says: {error}"
            ) from error
        together = iter([x if x.ndim == 1 else jnp.moveaxis(x, 0, out_axes) for x in arrays])
        outs, out_treedef = outputs
        outs = [next(together) if is_array(out) else out for out in outs]
        return jax.tree.unflatten(out_treedef, outs)

    # Otherwise jax.jit would count and name the arguments by fun's signature, without bank and ids.
    del adapted.__wrapped__
    signature = signature_with(fun, "bank", "ids")
    if signature is not None:
        adapted.__signature__ = signature  # type: ignore[attr-defined]
    return adapted


def _slots(ids: Any, slots: int, token_axes: Any) -> jax.Array:
    """The slot of each example, or of each of its tokens; the number of slots for the base."""
    axes = 1 if token_axes is None else 2
    ids = ids if hasattr(ids, "dtype") else np.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.ndim != axes:
        what = "[batch], or [batch, tokens] with token_axes" if axes == 1 else "[batch, tokens]"
        raise AdapterError(
            f"expected ids as integers of shape {what}, such as bank.ids(names); got {ids.dtype} "
            f"of shape {ids.shape}"
        )
    if not isinstance(ids, jax.core.Tracer) and (np.asarray(ids) >= slots).any():
        raise AdapterError(f"expected ids below {slots}, the number of slots; got {ids}")
    if not ids.shape[0]:
        raise AdapterError("expected ids of one example at least, got none")
    if ids.dtype.itemsize < 4:
        ids = ids.astype(np.int32)  # which, unlike an int8, holds the number of slots
    return jnp.where((ids >= 0) & (ids < slots), ids, slots).astype(jnp.int32)


def _by_leaf(name: str, prefix: Any, args: tuple[Any, ...]) -> dict[int, int]:
    """The axis of each array among the arguments' leaves that has one, by the leaf's index."""
    prefix = tuple(prefix) if isinstance(prefix, list) else prefix
    # None would be a tree without leaves.
    marked = jax.tree.map(
        lambda axis: _SHARED if axis is None else axis, prefix, is_leaf=lambda axis: axis is None
    )
    try:
        full = jax.tree.broadcast(marked, args)
    except ValueError as error:
        raise ConfigError(
            f"expected {name} to be an integer, None, or a tree prefix of the {len(args)} "
            f"arguments after the ids; got {prefix!r}"
        ) from error
    found = {}
    for k, (axis, leaf) in enumerate(zip(*map(jax.tree.leaves, (full, args)), strict=True)):
        if axis is _SHARED or not is_array(leaf):
            continue
        if not isinstance(axis, int) or not -leaf.ndim <= axis < leaf.ndim:
            raise ConfigError(f"expected {name} of {_name(args, k)}, got {axis!r} for {leaf.shape}")
        found[k] = axis % leaf.ndim
    return found


def _name(args: tuple[Any, ...], index: int) -> str:
    """What an argument's leaf is called in errors."""
    key_path, leaf = jax.tree_util.tree_leaves_with_path(args)[index]
    return f"argument {path_of(key_path)}, of shape {leaf.shape}"


def _example_axes(in_axes: Any, args: tuple[Any, ...], size: int) -> dict[int, int]:
    """The axis of the examples in each of the arguments' leaves that has one."""
    axes, leaves = _by_leaf("in_axes", in_axes, args), jax.tree.leaves(args)
    odd = [_name(args, k) for k, axis in axes.items() if leaves[k].shape[axis] != size]
    if odd:
        raise AdapterError(
            f"expected as many examples as ids, {size}, along in_axes={in_axes}; got "
            + "; ".join(odd)
        )
    return axes


def _token_axes(token_axes: Any, args: tuple[Any, ...], size: tuple[int, ...]) -> dict[int, int]:
    """The axis of the tokens in each of the arguments' leaves that has one."""
    if token_axes is None:
        return {}
    axes, leaves = _by_leaf("token_axes", token_axes, args), jax.tree.leaves(args)
    odd = [_name(args, k) for k, axis in axes.items() if leaves[k].shape[axis] != size[0]]
    if odd:
        raise AdapterError(
            f"expected as many tokens as ids of an example, {size[0]}, along "
            f"token_axes={token_axes}; got " + "; ".join(odd)
        )
    return axes


def _alone(out: jax.Array, out_axes: int) -> jax.Array:
    """An output for a batch of one without the axis of the examples; a scalar has none."""
    if out.ndim == 0:
        return out
    if not -out.ndim <= out_axes < out.ndim or out.shape[out_axes] != 1:
        raise AdapterError(
            f"expected outputs with the axis of the examples at out_axes={out_axes}, of size 1 for "
            f"a batch of one; got shape {out.shape}"
        )
    return jnp.squeeze(out, out_axes)
