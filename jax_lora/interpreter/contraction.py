"""Primitives that contract a weight with an input: ``x W`` becomes ``x W + scale (x a) b``.

Formed are the smaller of two weights that are multiplied, a convolution by batch groups, one whose
window and outputs are in one factor, and ragged products in other forms than rows by expert. Where
shardings are part of the types, an update has that of the product it is added to.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from string import ascii_letters
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jax_lora.adapter import RANK
from jax_lora.interpreter.core import Interpreter, Unfactorable, evaluate_one, rule
from jax_lora.interpreter.cost import Product
from jax_lora.interpreter.explicit import distinct, explicit_sharding, spec_of, split_like
from jax_lora.interpreter.mixed import mixed_einsum
from jax_lora.virtual import LoraWeight, Selected, aligned, wider

_RANK_LETTER = "Z"
#: Leaves no trace of an inner `jax.jit` in the jaxpr around it; older versions know one way only.
_INLINE: Any = jax.Inline.JAX_EARLY if hasattr(jax, "Inline") else True
#: What a convolution with another kernel has in common with the one it stands for.
_CONV_PARAMS = (
    *("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers"),
    *("precision", "preferred_element_type"),
)


def low_rank_einsum(
    interpreter: Interpreter,
    x: jax.Array,
    x_letters: Sequence[str],
    weight: LoraWeight,
    weight_letters: Sequence[str],
    out_letters: Sequence[str],
    *,
    token: str = "",
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: NamedSharding | None = None,
) -> jax.Array:
    """``scale * einsum(x, a, b -> out)`` as two contractions, through the rank, cheaper one first.

    The factors are cast to the operands' dtype at use; ``scale`` multiplies the intermediate, which
    has the rank in place of all the axes of one factor and is the smallest array at hand.

    Args:
        interpreter: Puts the two contractions together.
        x: The other operand.
        x_letters: One letter per axis of ``x``; equal letters are the same index.
        weight: The virtual weight, whose ``w`` is not used here.
        weight_letters: One letter per axis of the weight.
        out_letters: The letters of the result. A letter that only ``w`` has, because the factors
            were broadcast along it, yields an axis of size 1.
        token: Where each token selects factors of its own, the letter of their axis.
        precision: As in the contraction that is replaced.
        preferred_element_type: As in the contraction that is replaced.
        out_sharding: The result's sharding, where shardings are part of the types.

    Returns:
        The update of the contraction's result, to be added to ``x W``.
    """
    factors = [
        (f, [_RANK_LETTER if i == RANK else weight_letters[i] for i in axes])
        for f, axes in weight.factors()
    ]
    size: dict[str, int] = dict(zip(x_letters, x.shape, strict=True))
    for factor, letters in factors:
        size.update(zip(letters, factor.shape, strict=True))

    def order(first: int) -> tuple[int, int, list[str]]:
        near, far = factors[first][1], factors[1 - first][1]
        reached = [*x_letters, *(n for n in near if n not in x_letters)]
        kept = [n for n in reached if n in out_letters or n in far]
        cost = math.prod(size[n] for n in reached)
        return cost + math.prod(size[n] for n in {*kept, *far}), first, kept

    _, first, kept = min(order(0), order(1))
    (near_factor, near), (far_factor, far) = factors[first], factors[1 - first]
    reached_out = [n for n in out_letters if n in kept or n in far]
    options = {"precision": precision, "preferred_element_type": preferred_element_type}
    hidden_sharding = None
    if out_sharding is not None and not weight.selects:
        # The rank is whole, and every other axis is split as in the operand that it comes from.
        names = _split_as(near_factor, near) | _split_as(x, x_letters) | {_RANK_LETTER: None}
        hidden_sharding = NamedSharding(out_sharding.mesh, distinct(names[n] for n in kept))
        names = dict(zip(out_letters, spec_of(out_sharding, len(out_letters)), strict=True))
        out_sharding = NamedSharding(
            out_sharding.mesh, PartitionSpec(*[names[n] for n in reached_out])
        )

    dtype = wider(x.dtype, weight.dtype)

    def to_rank(x: jax.Array, factor: jax.Array) -> jax.Array:
        return product(x_letters, near, kept, x, factor, hidden_sharding)

    def from_rank(hidden: jax.Array) -> jax.Array:
        # One scale, or one for each token.
        others = [k for k, n in enumerate(kept) if n != token] if weight.scale.ndim else []
        hidden = _scaled(hidden, jnp.expand_dims(weight.scale, others), dtype=dtype)
        if isinstance(near_factor, Selected):  # zeros times infinities are not zero
            exists = jnp.expand_dims(near_factor.exists, others)
            hidden = jnp.where(exists, hidden, jnp.zeros_like(hidden))
        return product(kept, far, reached_out, hidden, far_factor, out_sharding)

    def product(
        left: Sequence[str],
        right: Sequence[str],
        out: Sequence[str],
        x: jax.Array,
        factor: Any,
        sharding: NamedSharding | None,
    ) -> jax.Array:
        if isinstance(factor, Selected):
            return mixed_einsum(x, left, factor, right, out, token, dtype=dtype, **options)
        spec = f"{''.join(left)},{''.join(right)}->{''.join(out)}"
        return _einsum(spec, x, factor, dtype=dtype, out_sharding=sharding, **options)

    out = interpreter.updated(to_rank, x, near_factor, from_rank)
    return jnp.expand_dims(out, [k for k, n in enumerate(out_letters) if n not in reached_out])


# Compiled together with what is around them; functions of their own, so that the layers of a model
# whose weights have the same shape are traced and differentiated once.
@functools.partial(
    jax.jit,
    static_argnames=("spec", "dtype", "out_sharding", "precision", "preferred_element_type"),
    inline=_INLINE,
)
def _einsum(spec: str, x: jax.Array, factor: jax.Array, *, dtype: Any, **options: Any) -> jax.Array:
    return jnp.einsum(spec, x.astype(dtype), factor.astype(dtype), **options)


@functools.partial(jax.jit, static_argnames="dtype", inline=_INLINE)
def _scaled(hidden: jax.Array, scale: jax.Array, *, dtype: Any) -> jax.Array:
    return (hidden * scale.astype(hidden.dtype)).astype(dtype)


def _split_as(array: jax.Array, letters: Sequence[str]) -> dict[str, Any]:
    """The mesh axes along which each of an array's axes is split."""
    return dict(zip(letters, spec_of(jax.typeof(array).sharding, array.ndim), strict=True))


def _product(x: jax.Array, weight: LoraWeight, *, stack: int, fan_in: int, fan_out: int) -> Product:
    rank = weight.a.shape[weight.a_axes.index(RANK)]
    rows = x.size // max(fan_in, 1)
    return Product(x.size, rows, fan_in, fan_out, rank, stack, weight.dtype.itemsize)


def _gained(
    array: jax.Array, array_letters: Sequence[str], weight: LoraWeight, letters: Sequence[str]
) -> jax.Array:
    """``array`` times the weight's gain along the axes with the same letters.

    Raises:
        Unfactorable: The array does not have all of the gain's axes.
    """
    if weight.gain is None:
        return array
    axes = [i for i in weight.gain_axes if i != RANK]
    places = {array_letters.index(letters[i]): i for i in axes if letters[i] in array_letters}
    if len(places) != len(axes):
        raise Unfactorable
    wide = wider(array.dtype, weight.gain.dtype)
    order = [places.get(k, -2) for k in range(array.ndim)]
    gain = aligned(weight.gain.astype(wide), weight.gain_axes, order)
    return (array.astype(wide) * gain).astype(array.dtype)


@rule("dot_general", takes_selected=True)
def _dot_general(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    if all(isinstance(v, LoraWeight) for v in values):
        # A product of two adapted weights: the smaller one is formed, the larger stays factored.
        small = 0 if math.prod(values[0].shape) <= math.prod(values[1].shape) else 1
        values = list(values)
        values[small] = interpreter.materialize(values[small], eqn.primitive.name)
    side = 0 if isinstance(values[0], LoraWeight) else 1
    weight, x = values[side], values[1 - side]
    contract, batch = eqn.params["dimension_numbers"]
    if x.ndim + weight.ndim >= len(ascii_letters):
        raise Unfactorable

    free = iter(ascii_letters.replace(_RANK_LETTER, ""))
    letters: list[list[str]] = [[""] * values[0].ndim, [""] * values[1].ndim]
    batch_letters = []
    for pairs, is_batch in ((zip(*batch, strict=True), True), (zip(*contract, strict=True), False)):
        for i, j in pairs:
            letters[0][i] = letters[1][j] = next(free)
            if is_batch:
                batch_letters.append(letters[0][i])
    out_letters = list(batch_letters)
    for operand in letters:
        for i, known in enumerate(operand):
            if not known:
                operand[i] = next(free)
                out_letters.append(operand[i])

    stack, shared = (
        math.prod(weight.shape[pairs[side][k]] for k in range(len(pairs[side])))
        for pairs in (batch, contract)
    )
    fan_out = math.prod(weight.shape) // max(stack * shared, 1)
    formed = interpreter.formed(
        weight, eqn, values, _product(x, weight, stack=stack, fan_in=shared, fan_out=fan_out)
    )
    if formed is not None:
        return formed

    token = ""
    if weight.selects and weight.scale.ndim:
        summed = frozenset(contract[1 - side])
        weight, axis = interpreter.tokens.place(weight, eqn, 1 - side, summed)
        token = "" if axis is None else letters[1 - side][axis]
    gain = [letters[side][i] for i in weight.gain_axes if i != RANK]
    gain_first = not set(gain) <= set(out_letters)
    plain = list(values)
    plain[side] = weight.w
    if gain_first:
        plain[1 - side] = _gained(x, letters[1 - side], weight, letters[side])
    (out,) = evaluate_one(eqn, plain)
    sharding = explicit_sharding(out)
    if not gain_first:
        out = _gained(out, out_letters, weight, letters[side])
    update = low_rank_einsum(
        interpreter,
        interpreter.dropped(x, weight),
        letters[1 - side],
        weight,
        letters[side],
        out_letters,
        token=token,
        precision=eqn.params["precision"],
        preferred_element_type=eqn.params["preferred_element_type"],
        out_sharding=sharding,
    )
    interpreter.factored(weight, eqn)
    return [out + update.astype(out.dtype)]


@rule("conv_general_dilated")
def _conv(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    x, weight = values
    params = eqn.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    out_axis, in_axis, *window = numbers.rhs_spec
    if isinstance(x, LoraWeight) or params["batch_group_count"] != 1:
        raise Unfactorable
    # One factor must hold the window and the in-features, the other the out-features alone.
    near, far = sorted(weight.factors(), key=lambda factor: out_axis in factor[1])
    if set(near[1]) != {in_axis, *window, RANK} or set(far[1]) != {out_axis, RANK}:
        raise Unfactorable

    fan_out = weight.shape[out_axis]
    fan_in = math.prod(weight.shape) // max(fan_out, 1)
    positions = math.prod(eqn.outvars[0].aval.shape) // max(fan_out, 1)
    product = _product(x, weight, stack=1, fan_in=fan_in, fan_out=fan_out)
    product = dataclasses.replace(product, rows=positions)
    formed = interpreter.formed(weight, eqn, values, product)
    if formed is not None:
        return formed
    (out,) = evaluate_one(eqn, [x, weight.w])
    if weight.gain is not None:
        if set(weight.gain_axes) != {out_axis, RANK}:
            raise Unfactorable
        names = ["" for _ in range(out.ndim)]
        names[numbers.out_spec[1]] = "o"
        out = _gained(
            out, names, weight, ["o" if i == out_axis else "" for i in range(weight.ndim)]
        )
    dtype = wider(x.dtype, weight.dtype)
    x = interpreter.dropped(x, weight)
    options = {name: params[name] for name in ("precision", "preferred_element_type")}

    def update(x: jax.Array, first: jax.Array, last: jax.Array, scale: jax.Array) -> jax.Array:
        def to_rank(x: jax.Array, factor: jax.Array) -> jax.Array:
            # A kernel whose out-features are the rank. All groups share it, so they are more
            # examples to it.
            order = [near[1].index(RANK if i == out_axis else i) for i in range(weight.ndim)]
            return lax.conv_general_dilated(
                _groups_as_examples(x, numbers.lhs_spec, groups),
                jnp.transpose(factor, order),
                **{name: params[name] for name in _CONV_PARAMS},
            )

        def from_rank(hidden: jax.Array) -> jax.Array:
            hidden = _scaled(hidden, scale, dtype=dtype)
            b = jnp.transpose(last.astype(dtype), [far[1].index(RANK), far[1].index(out_axis)])
            if groups == 1:
                # A window of one pixel: unlike a matrix product it needs no transposition, whatever
                # the order of the axes, and its derivatives need none either.
                pixel = jnp.expand_dims(b, range(2, weight.ndim))
                order = [(in_axis, out_axis, *window).index(i) for i in range(weight.ndim)]
                return lax.conv_general_dilated(
                    hidden,
                    jnp.transpose(pixel, order),
                    (1,) * len(window),
                    "VALID",
                    dimension_numbers=numbers._replace(lhs_spec=numbers.out_spec),
                    **options,
                )
            # Convolutions by groups are slow, and so are their derivatives.
            outer = numbers.out_spec[:2]
            hidden = jnp.moveaxis(hidden, outer, (0, -1))
            hidden = jnp.moveaxis(hidden.reshape(-1, groups, *hidden.shape[1:]), 1, -2)
            b = b.reshape(b.shape[0], groups, -1)
            added = jnp.einsum("...gr,rgo->...go", hidden, b, **options)
            return jnp.moveaxis(added.reshape(*added.shape[:-2], -1), (0, -1), outer)

        x, first = x.astype(dtype), first.astype(dtype)
        return interpreter.updated(to_rank, x, first, from_rank).astype(out.dtype)

    interpreter.factored(weight, eqn)
    return [out + split_like(out, update, x, near[0], far[0], weight.scale)]


def _groups_as_examples(x: jax.Array, spec: Sequence[int], groups: int) -> jax.Array:
    """The groups of a convolution's input moved from its features to its batch, minor there."""
    batch, feature, *_ = spec
    shape = list(x.shape)
    shape[batch], shape[feature] = shape[batch] * groups, shape[feature] // groups
    x = x.reshape(*x.shape[:feature], groups, shape[feature], *x.shape[feature + 1 :])
    return jnp.moveaxis(x, feature, batch + 1).reshape(shape)


@rule("ragged_dot_general")
def _ragged_dot(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    x, weight, *rest = values
    params = eqn.params
    numbers = params["ragged_dot_dimension_numbers"]
    contract, batch = numbers.dot_dimension_numbers
    plain = not isinstance(x, LoraWeight) and not any(isinstance(v, LoraWeight) for v in rest)
    usual = (tuple(contract[0]), tuple(batch[0]), x.ndim, weight.ndim) == ((1,), (), 2, 3)
    grouped = tuple(numbers.lhs_ragged_dimensions) == (0,) and len(rest) == 1
    if not (plain and usual and grouped and tuple(numbers.rhs_group_dimensions) == (0,)):
        raise Unfactorable
    in_axis = contract[1][0]
    out_axis = 3 - in_axis
    # The experts' matrices are independent, so each factor has its own for every expert.
    near, far = sorted(weight.factors(), key=lambda factor: out_axis in factor[1])
    if set(near[1]) != {0, in_axis, RANK} or set(far[1]) != {0, out_axis, RANK}:
        raise Unfactorable

    sizes = {"stack": weight.shape[0], "fan_in": weight.shape[in_axis]}
    product = _product(x, weight, **sizes, fan_out=weight.shape[out_axis])
    formed = interpreter.formed(weight, eqn, values, product)
    if formed is not None:
        return formed
    (out,) = evaluate_one(eqn, [x, weight.w, *rest])
    dtype = wider(x.dtype, weight.dtype)
    (group_sizes,) = rest
    if weight.gain is not None:
        if set(weight.gain_axes) != {0, out_axis, RANK}:
            raise Unfactorable
        gain = aligned(weight.gain, weight.gain_axes, (0, out_axis))
        rows = jnp.repeat(gain, group_sizes, axis=0, total_repeat_length=out.shape[0])
        wide = wider(out.dtype, gain.dtype)
        # Rows beyond the groups are zero in the base.
        out = (out.astype(wide) * rows.astype(wide)).astype(out.dtype)
    x = interpreter.dropped(x, weight)
    options = {name: params[name] for name in ("precision", "preferred_element_type")}

    def update(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, sizes: Any) -> jax.Array:
        a = jnp.transpose(a, [near[1].index(i) for i in (0, in_axis, RANK)]).astype(dtype)
        b = jnp.transpose(b, [far[1].index(i) for i in (0, RANK, out_axis)]).astype(dtype)

        def to_rank(x: jax.Array, factor: jax.Array) -> jax.Array:
            return lax.ragged_dot(x, factor, sizes, **options)

        def from_rank(hidden: jax.Array) -> jax.Array:
            return lax.ragged_dot(_scaled(hidden, scale, dtype=dtype), b, sizes, **options)

        added = interpreter.updated(to_rank, x.astype(dtype), a, from_rank)
        return added.astype(out.dtype)

    interpreter.factored(weight, eqn)
    return [out + split_like(out, update, x, near[0], far[0], weight.scale, group_sizes)]
