"""Primitives that contract a weight with an input: ``x W`` becomes ``x W + scale (x a) b``.

Formed are the smaller of two weights that are multiplied, a convolution by batch groups, one whose
window and outputs are in one factor, and ragged products in other forms than rows by expert. Where
shardings are part of the types, those of ``dot_general`` alone are named.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from string import ascii_letters
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_lora.adapter import RANK
from jax_lora.interpreter.core import Interpreter, Unfactorable, evaluate_one, rule
from jax_lora.virtual import LoraWeight, wider

_RANK_LETTER = "Z"
#: Leaves no trace of an inner `jax.jit` in the jaxpr around it; older versions know one way only.
_INLINE: Any = jax.Inline.JAX_EARLY if hasattr(jax, "Inline") else True
#: What a convolution with another kernel has in common with the one it stands for.
_CONV_PARAMS = (
    *("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers"),
    *("feature_group_count", "precision", "preferred_element_type"),
)


def low_rank_einsum(
    x: jax.Array,
    x_letters: Sequence[str],
    weight: LoraWeight,
    weight_letters: Sequence[str],
    out_letters: Sequence[str],
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: NamedSharding | None = None,
) -> jax.Array:
    """``scale * einsum(x, a, b -> out)`` as two contractions, through the rank, cheaper one first.

    The factors are cast to the operands' dtype at use; ``scale`` multiplies the intermediate, which
    has the rank in place of all the axes of one factor and is the smallest array at hand.

    Args:
        x: The other operand.
        x_letters: One letter per axis of ``x``; equal letters are the same index.
        weight: The virtual weight, whose ``w`` is not used here.
        weight_letters: One letter per axis of the weight.
        out_letters: The letters of the result. A letter that only ``w`` has, because the factors
            were broadcast along it, yields an axis of size 1.
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
    if out_sharding is not None:
        # The rank is whole, and every other axis is split as in the operand that it comes from.
        names = _split_as(near_factor, near) | _split_as(x, x_letters) | {_RANK_LETTER: None}
        hidden_sharding = NamedSharding(out_sharding.mesh, _distinct(names[n] for n in kept))
        names = dict(zip(out_letters, _spec_of(out_sharding, len(out_letters)), strict=True))
        out_sharding = NamedSharding(
            out_sharding.mesh, PartitionSpec(*[names[n] for n in reached_out])
        )
    return _two_products(
        x,
        near_factor,
        far_factor,
        weight.scale,
        dtype=wider(x.dtype, weight.dtype),
        specs=(_spec(x_letters, near, kept), _spec(kept, far, reached_out)),
        out_shardings=(hidden_sharding, out_sharding),
        new_axes=tuple(k for k, n in enumerate(out_letters) if n not in reached_out),
        **options,
    )


# Compiled together with what is around it; a function of its own, so that the layers of a model
# whose weights have the same shape are traced and differentiated once.
@functools.partial(
    jax.jit,
    static_argnames=(
        *("dtype", "specs", "out_shardings", "new_axes"),
        *("precision", "preferred_element_type"),
    ),
    inline=_INLINE,
)
def _two_products(
    x: jax.Array,
    near: jax.Array,
    far: jax.Array,
    scale: jax.Array,
    *,
    dtype: Any,
    specs: tuple[str, str],
    out_shardings: tuple[NamedSharding | None, NamedSharding | None],
    new_axes: tuple[int, ...],
    **options: Any,
) -> jax.Array:
    """``scale * (x near) far``."""
    x, near, far = (v.astype(dtype) for v in (x, near, far))
    hidden = jnp.einsum(specs[0], x, near, out_sharding=out_shardings[0], **options)
    hidden = (hidden * scale.astype(hidden.dtype)).astype(dtype)
    out = jnp.einsum(specs[1], hidden, far, out_sharding=out_shardings[1], **options)
    return jnp.expand_dims(out, new_axes)


def _spec(left: Sequence[str], right: Sequence[str], out: Sequence[str]) -> str:
    return f"{''.join(left)},{''.join(right)}->{''.join(out)}"


def _explicit_sharding(array: jax.Array) -> NamedSharding | None:
    """The sharding of an array, if shardings are part of the types of its mesh."""
    sharding = jax.typeof(array).sharding
    explicit = isinstance(sharding, NamedSharding) and not sharding.mesh.empty
    return sharding if explicit and AxisType.Explicit in sharding.mesh.axis_types else None


def _spec_of(sharding: NamedSharding, ndim: int) -> tuple[Any, ...]:
    return (*sharding.spec, *[None] * (ndim - len(sharding.spec)))


def _split_as(array: jax.Array, letters: Sequence[str]) -> dict[str, Any]:
    """The mesh axes along which each of an array's axes is split."""
    return dict(zip(letters, _spec_of(jax.typeof(array).sharding, array.ndim), strict=True))


def _distinct(entries: Iterable[Any]) -> PartitionSpec:
    """A spec that splits along each mesh axis once, the first time."""
    used: set[str] = set()
    spec = []
    for entry in entries:
        names = set(entry) if isinstance(entry, tuple) else {entry} - {None}
        spec.append(None if names & used else entry)
        used |= names
    return PartitionSpec(*spec)


@rule("dot_general")
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

    plain = list(values)
    plain[side] = weight.w
    (out,) = evaluate_one(eqn, plain)
    update = low_rank_einsum(
        x,
        letters[1 - side],
        weight,
        letters[side],
        out_letters,
        precision=eqn.params["precision"],
        preferred_element_type=eqn.params["preferred_element_type"],
        out_sharding=_explicit_sharding(out),
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

    (out,) = evaluate_one(eqn, [x, weight.w])
    dtype = wider(x.dtype, weight.dtype)
    # The first factor as a kernel whose out-features are the rank, once for each group.
    order = [near[1].index(RANK if i == out_axis else i) for i in range(weight.ndim)]
    kernel = jnp.transpose(near[0].astype(dtype), order)
    kernel = jnp.concatenate([kernel] * groups, axis=out_axis)
    hidden = lax.conv_general_dilated(
        x.astype(dtype),
        kernel,
        **{name: params[name] for name in _CONV_PARAMS},
    )
    hidden = (hidden * weight.scale.astype(hidden.dtype)).astype(dtype)
    last = jnp.transpose(far[0].astype(dtype), [far[1].index(RANK), far[1].index(out_axis)])
    options = {name: params[name] for name in ("precision", "preferred_element_type")}
    if groups == 1:
        # A window of one pixel: unlike a matrix product it needs no transposition, whatever the
        # order of the axes, and its derivatives need none either.
        pixel = jnp.expand_dims(last, range(2, weight.ndim))
        order = [(in_axis, out_axis, *window).index(i) for i in range(weight.ndim)]
        update = lax.conv_general_dilated(
            hidden,
            jnp.transpose(pixel, order),
            (1,) * len(window),
            "VALID",
            dimension_numbers=numbers._replace(lhs_spec=numbers.out_spec),
            **options,
        )
    else:
        # Convolutions by groups are slow, and so are their derivatives.
        feature = numbers.out_spec[1]
        hidden = jnp.moveaxis(hidden, feature, -1)
        hidden = hidden.reshape(*hidden.shape[:-1], groups, -1)
        last = last.reshape(last.shape[0], groups, -1)
        update = jnp.einsum("...gr,rgo->...go", hidden, last, **options)
        update = jnp.moveaxis(update.reshape(*update.shape[:-2], -1), -1, feature)
    interpreter.factored(weight, eqn)
    return [out + update.astype(out.dtype)]


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

    (out,) = evaluate_one(eqn, [x, weight.w, *rest])
    dtype = wider(x.dtype, weight.dtype)
    (group_sizes,) = rest
    options = {name: params[name] for name in ("precision", "preferred_element_type")}
    a = jnp.transpose(near[0], [near[1].index(i) for i in (0, in_axis, RANK)]).astype(dtype)
    b = jnp.transpose(far[0], [far[1].index(i) for i in (0, RANK, out_axis)]).astype(dtype)
    hidden = lax.ragged_dot(x.astype(dtype), a, group_sizes, **options)
    hidden = (hidden * weight.scale.astype(hidden.dtype)).astype(dtype)
    update = lax.ragged_dot(hidden, b, group_sizes, **options)
    interpreter.factored(weight, eqn)
    return [out + update.astype(out.dtype)]
