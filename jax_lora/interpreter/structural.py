"""Primitives that move a weight's entries around: they relabel the factors' axes.

Each rule applies the equation to ``W`` as it stands and does to each factor what the equation does
to the axes that factor holds. A weight stays factored only if no axis group that the operation
mixes is split between the two factors. Formed are, among others, concatenated and padded weights,
reshapes across in- and out-axes, products with anything but a scalar, and sums of two weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from jax_lora.adapter import RANK
from jax_lora.interpreter.core import Interpreter, Unfactorable, evaluate_one, rule
from jax_lora.sharding import factor_spec
from jax_lora.virtual import LoraWeight


def only_first(values: list[Any]) -> LoraWeight:
    """The first operand, if it and no other one is a virtual weight."""
    weight, *rest = values
    if not isinstance(weight, LoraWeight) or any(isinstance(v, LoraWeight) for v in rest):
        raise Unfactorable
    return weight


@rule("transpose")
def _transpose(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    weight = only_first(values)
    moved = {old: new for new, old in enumerate(eqn.params["permutation"])} | {RANK: RANK}
    (w,) = evaluate_one(eqn, [weight.w])
    return [weight.map_parts(w, lambda f, axes: (f, [moved[i] for i in axes]))]


@rule("convert_element_type")
def _convert(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    # The factors keep their own dtype and are cast where they are used.
    weight = only_first(values)
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        raise Unfactorable
    (w,) = evaluate_one(eqn, [weight.w])
    return [dataclasses.replace(weight, w=w)]


@rule("copy", "copy_p", "name", "sharding_constraint", "reduce_precision", "pvary", "pcast")
def _identity(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    weight = only_first(values)
    (w,) = evaluate_one(eqn, [weight.w])
    return [dataclasses.replace(weight, w=w)]


@rule("reshard", "mesh_cast")
def _reshard(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    # The factors move with the weight, split along its axes that they hold.
    weight = only_first(values)
    sharding = eqn.params["dst_sharding"]

    def move(array: jax.Array, labels: tuple[int, ...]) -> jax.Array:
        own = NamedSharding(sharding.mesh, factor_spec(sharding.spec, labels))
        (moved,) = evaluate_one(eqn.replace(params={**eqn.params, "dst_sharding": own}), [array])
        return moved

    (w,) = evaluate_one(eqn, [weight.w])
    moved = weight.map_parts(w, lambda f, axes: (move(f, axes), axes))
    return [dataclasses.replace(moved, scale=move(weight.scale, ()))]


@rule("stop_gradient")
def _stop_gradient(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    return [jax.tree.map(lax.stop_gradient, only_first(values))]


@rule("neg")
def _neg(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    weight = only_first(values)
    return [dataclasses.replace(weight, w=-weight.w, scale=-weight.scale)]


@rule("mul")
def _mul(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    left, right = values
    weight, factor = (left, right) if isinstance(left, LoraWeight) else (right, left)
    if isinstance(factor, LoraWeight) or jnp.ndim(factor) != 0:
        raise Unfactorable
    w = weight.w * jnp.asarray(factor, weight.dtype)
    scale = weight.scale * jnp.asarray(factor, weight.scale.dtype)
    return [dataclasses.replace(weight, w=w, scale=scale)]


@rule("div")
def _div(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    weight = only_first(values)
    if jnp.ndim(values[1]) != 0:
        raise Unfactorable
    w = weight.w / jnp.asarray(values[1], weight.dtype)
    scale = weight.scale / jnp.asarray(values[1], weight.scale.dtype)
    return [dataclasses.replace(weight, w=w, scale=scale)]


def reshape_groups(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The smallest groups of axes that a reshape maps onto each other.

    Axes of size 1 come and go alone, as a group with an empty other side.

    Example:
        >>> reshape_groups((6, 4), (2, 3, 1, 4))
        [((0,), (0, 1)), ((), (2,)), ((1,), (3,))]
    """
    groups: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        if i < len(old) and old[i] == 1:
            groups.append(((i,), ()))
            i += 1
        elif j < len(new) and new[j] == 1:
            groups.append(((), (j,)))
            j += 1
        else:
            start_i, start_j = i, j
            size_i, size_j = old[i], new[j]
            i, j = i + 1, j + 1
            while size_i != size_j:
                if size_i < size_j:
                    size_i *= old[i]
                    i += 1
                else:
                    size_j *= new[j]
                    j += 1
            groups.append((tuple(range(start_i, i)), tuple(range(start_j, j))))
    return groups


def reshape_order(eqn: Any) -> Sequence[int]:
    """The order in which a reshape reads its operand's axes: `vmap` of a convolution moves them."""
    order = eqn.params["dimensions"] if eqn.primitive.name == "reshape" else None
    return range(len(eqn.invars[0].aval.shape)) if order is None else tuple(order)


@rule("reshape", "squeeze")
def _reshape(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    weight = only_first(values)
    new = tuple(eqn.outvars[0].aval.shape)
    if 0 in weight.shape:
        raise Unfactorable
    moved = {i: k for k, i in enumerate(reshape_order(eqn))} | {RANK: RANK}
    old = [weight.shape[i] for i in reshape_order(eqn)]
    groups = reshape_groups(old, new)

    def reshape(factor: jax.Array, labels: tuple[int, ...]) -> tuple[jax.Array, list[int]]:
        axes = [moved[i] for i in labels]
        order, sizes, after = [axes.index(RANK)], [factor.shape[axes.index(RANK)]], [RANK]
        for old_axes, new_axes in groups:
            real = [i for i in old_axes if old[i] != 1]
            held = [i for i in old_axes if i in axes]
            if real and set(real) <= set(axes):
                order += [axes.index(i) for i in held]
                sizes += [new[j] for j in new_axes]
                after += new_axes
            elif real and held:
                raise Unfactorable  # a group that is split between the two factors
            else:
                order += [axes.index(i) for i in held]  # axes of size 1 vanish in the reshape
        return jnp.transpose(factor, order).reshape(sizes), after

    (w,) = evaluate_one(eqn, [weight.w])
    return [weight.map_parts(w, reshape)]


@rule("broadcast_in_dim")
def _broadcast(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    # A new axis, also what expand_dims is made of, is an axis that neither factor has.
    weight = only_first(values)
    new, moved = eqn.outvars[0].aval.shape, eqn.params["broadcast_dimensions"]
    if any(weight.shape[i] != new[j] for i, j in enumerate(moved)):
        raise Unfactorable  # an axis of size 1 that is repeated
    labels = dict(enumerate(moved)) | {RANK: RANK}
    (w,) = evaluate_one(eqn, [weight.w])
    return [weight.map_parts(w, lambda f, axes: (f, [labels[i] for i in axes]))]


@rule("slice")
def _slice(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    weight = only_first(values)
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * weight.ndim

    def cut(factor: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
        for axis, i in enumerate(axes):
            if i != RANK and (starts[i], limits[i], strides[i]) != (0, weight.shape[i], 1):
                factor = lax.slice_in_dim(factor, starts[i], limits[i], strides[i], axis=axis)
        return factor, axes

    (w,) = evaluate_one(eqn, [weight.w])
    return [weight.map_parts(w, cut)]


@rule("dynamic_slice")
def _dynamic_slice(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    weight = only_first(values)
    starts, sizes = values[1:], eqn.params["slice_sizes"]

    def cut(factor: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
        for axis, i in enumerate(axes):
            if i != RANK and sizes[i] != weight.shape[i]:
                factor = lax.dynamic_slice_in_dim(factor, starts[i], sizes[i], axis=axis)
        return factor, axes

    (w,) = evaluate_one(eqn, [weight.w, *starts])
    return [weight.map_parts(w, cut)]


@rule("split")
def _split(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    weight = only_first(values)
    cut, sizes = eqn.params["axis"], eqn.params["sizes"]
    starts = [sum(sizes[:k]) for k in range(len(sizes))]

    def part(k: int) -> Any:
        def take(factor: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
            if cut in axes:
                end = starts[k] + sizes[k]
                factor = lax.slice_in_dim(factor, starts[k], end, axis=axes.index(cut))
            return factor, axes

        return take

    ws = evaluate_one(eqn, [weight.w])
    return [weight.map_parts(w, part(k)) for k, w in enumerate(ws)]


@rule("rev")
def _rev(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    weight = only_first(values)

    def flip(factor: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
        return lax.rev(factor, [axes.index(i) for i in eqn.params["dimensions"] if i in axes]), axes

    (w,) = evaluate_one(eqn, [weight.w])
    return [weight.map_parts(w, flip)]


@rule("add", "add_any", "sub")
def _add(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    # A dense term goes to W; of a difference, only the minuend's update keeps its sign.
    left, right = values
    if isinstance(left, LoraWeight) == isinstance(right, LoraWeight):
        raise Unfactorable
    weight = left if isinstance(left, LoraWeight) else right
    if eqn.outvars[0].aval.shape != weight.shape or weight.gain is not None:
        raise Unfactorable
    (w,) = evaluate_one(eqn, [v.w if isinstance(v, LoraWeight) else v for v in values])
    negative = eqn.primitive.name == "sub" and weight is right
    return [dataclasses.replace(weight, w=w, scale=-weight.scale if negative else weight.scale)]


@rule("all_gather")
def _all_gather(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    weight = only_first(values)
    params = eqn.params
    names, gathered = params["axis_name"], params["all_gather_dimension"]
    if not params["tiled"]:
        raise Unfactorable
    constant = [f for f, axes in weight.parts().values() if gathered not in axes]
    if any(set(names) & set(_varying(f)) for f in (*constant, weight.scale)):
        raise Unfactorable  # each device has a factor of its own for its part

    def gather(factor: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
        if gathered in axes:
            axis, groups = axes.index(gathered), params["axis_index_groups"]
            factor = lax.all_gather(factor, names, axis=axis, axis_index_groups=groups, tiled=True)
        return factor, axes

    (w,) = evaluate_one(eqn, [weight.w])
    return [weight.map_parts(w, gather)]


def _varying(array: jax.Array) -> Iterable[str]:
    """The mesh axes along which a value inside ``shard_map`` is known to differ."""
    kind = jax.typeof(array)
    if hasattr(kind, "vma"):  # older versions
        return kind.vma
    return getattr(getattr(kind, "manual_axis_type", None), "varying", ())
