"""Looking up parts of a weight: an embedding's rows, and the layers or experts of a stack."""

from __future__ import annotations

import dataclasses
from string import ascii_letters
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_lora.adapter import RANK
from jax_lora.interpreter.core import Interpreter, Unfactorable, evaluate_one, rule
from jax_lora.interpreter.explicit import look_up
from jax_lora.interpreter.mixed import mixed_einsum
from jax_lora.interpreter.structural import only_first
from jax_lora.virtual import LoraWeight


def is_strided_slice(eqn: Any) -> bool:
    """Whether a gather takes rows in order, each once: how older versions write ``w[::2]``."""
    params, (_, indices) = eqn.params, eqn.invars
    in_order = params["indices_are_sorted"] and params["unique_indices"]
    return bool(in_order and len(indices.aval.shape) == 2 and indices.aval.shape[1] == 1)


def picked_axes(eqn: Any) -> tuple[set[int], tuple[int, ...]]:
    """The operand's axes that a gather indexes, and those that it pairs with the indices'."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.invars[0].aval.shape
    paired = tuple(getattr(numbers, "operand_batching_dims", ()))
    # A start index along an axis of which all is taken can only be 0, or else fill the result.
    filled = eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    return {
        i
        for i in numbers.start_index_map
        if i in numbers.collapsed_slice_dims or sizes[i] != shape[i] or filled
    }, paired


@rule("gather", takes_selected=True)
def _gather(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    # Each factor looks up the axes that it has, at the same places as W.
    weight = only_first(values)
    if weight.selects:
        rows = _selected_rows(interpreter, eqn, weight, values[1])
        if rows is not None:
            return [rows]
        weight = interpreter.picked(weight, "gather")
    indices, params = values[1], eqn.params
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    picked, paired = picked_axes(eqn)
    if not set(numbers.collapsed_slice_dims) <= picked:
        raise Unfactorable

    formed = interpreter.formed(weight, eqn, values)
    if formed is not None:
        return formed
    (w,) = evaluate_one(eqn, [weight.w, indices])
    gone = {*numbers.collapsed_slice_dims, *paired}
    batch_axes = [i for i in range(w.ndim) if i not in numbers.offset_dims]
    kept = [i for i in range(weight.ndim) if i not in gone]
    out_axis = dict(zip(kept, numbers.offset_dims, strict=True)) | {RANK: RANK}
    partner = dict(zip(paired, getattr(numbers, "start_indices_batching_dims", ()), strict=True))

    def take(factor: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, list[int]]:
        """The factor with those of its axes looked up that are picked, the batch in front."""
        for k, i in enumerate(axes):
            if i != RANK and i not in (*picked, *gone):  # the start of an axis without an index
                factor = lax.slice_in_dim(factor, 0, sizes[i], axis=k)
        columns = [k for k, i in enumerate(numbers.start_index_map) if i in picked and i in axes]
        if not columns:
            aligned = out_axis | {i: batch_axes[k] for i, k in partner.items()}
            return factor, [aligned[i] for i in axes]
        own = [k for k, i in enumerate(axes) if i in paired]
        rest = [i for i in axes if i not in gone]
        batch = indices.ndim - 1
        gathered = lax.gather(
            factor,
            indices[..., jnp.array(columns)],
            lax.GatherDimensionNumbers(
                offset_dims=tuple(range(batch, batch + len(rest))),
                collapsed_slice_dims=tuple(
                    k for k, i in enumerate(axes) if i in numbers.collapsed_slice_dims
                ),
                start_index_map=tuple(axes.index(numbers.start_index_map[k]) for k in columns),
                operand_batching_dims=tuple(own),
                start_indices_batching_dims=tuple(partner[axes[k]] for k in own),
            ),
            slice_sizes=tuple(
                sizes[i] if i in (*picked, *paired) else n
                for i, n in zip(axes, factor.shape, strict=True)
            ),
            # Sorted by all columns does not mean sorted by some of them.
            indices_are_sorted=params["indices_are_sorted"]
            and (len(columns), len(own)) == (len(numbers.start_index_map), len(paired)),
            unique_indices=False,
            mode=params["mode"],
            # Out of bounds the base has its fill value, NaN by default, and the update adds 0.
            fill_value=0,
        )
        return gathered, [*batch_axes, *(out_axis[i] for i in rest)]

    looked_up = weight.map_parts(w, take)
    chosen = {*picked, *paired}
    stacked = all(
        chosen & set(axes) and set(axes) - {RANK, *chosen} for _, axes in weight.factors()
    )
    if stacked or is_strided_slice(eqn):
        return [looked_up]  # matrices picked from a stack, or a part of one: still a weight
    interpreter.factored(weight, eqn)
    # No dropout: rows are chosen, there is no input to drop.
    return [looked_up.materialize()]


def _selected_rows(
    interpreter: Interpreter, eqn: Any, weight: LoraWeight, indices: jax.Array
) -> jax.Array | None:
    """Rows ``W[i] + scale * a[i] b`` with factors out of a bank; None if it is no lookup of rows.

    The rows of ``a`` are looked up in the bank itself: an example's own table would be a long copy.
    """
    numbers = eqn.params["dimension_numbers"]
    picked, paired = picked_axes(eqn)

    def halves(weight: LoraWeight) -> Any:
        return sorted(weight.factors(), key=lambda factor: not picked & set(factor[1]))

    (_, labels), (_, far_labels) = halves(weight)
    others = {*far_labels, *weight.gain_axes}
    rows = labels[0] == RANK and set(labels[1:]) == picked == set(numbers.collapsed_slice_dims)
    if paired or not rows or picked & others:
        return None

    (w,) = evaluate_one(eqn, [weight.w, indices])
    batch_axes = [i for i in range(w.ndim) if i not in numbers.offset_dims]
    token_axis = None
    if weight.scale.ndim:
        weight, token_axis = interpreter.tokens.place(weight, eqn, 1)
    (near, _), (far, _) = halves(weight)

    def spread(per_token: jax.Array) -> jax.Array:
        """What there is one of, or one of for each token, with the axes of the lookups."""
        return jnp.expand_dims(per_token, [k for k in range(len(batch_axes)) if k != token_axis])

    columns = [numbers.start_index_map.index(i) for i in labels[1:]]
    first = 1 + len(near.steps)
    along = tuple(i for i in range(near.bank.ndim) if i != first)

    def rows_of(bank: jax.Array, at: tuple[jax.Array, ...]) -> jax.Array:
        slot, indices, *steps = at
        places = [spread(slot), *steps, *(indices[..., k] for k in columns)]
        places = [jnp.broadcast_to(i, indices.shape[:-1]).astype(jnp.int32) for i in places]
        taken = lax.gather(
            bank,
            jnp.stack(places, axis=-1),
            lax.GatherDimensionNumbers((indices.ndim - 1,), along, along),
            slice_sizes=(*[1] * first, near.shape[0], *[1] * len(columns)),
            mode=eqn.params["mode"],
            # Out of bounds the base has its fill value, NaN by default, and the update adds 0.
            fill_value=0,
        )
        exists = (spread(slot) < bank.shape[0])[..., None]
        return jnp.where(exists, taken, jnp.zeros_like(taken))

    hidden = look_up(rows_of, near.bank, (near.slot, indices, *near.steps))
    hidden = hidden * spread(weight.scale).astype(hidden.dtype)[..., None]
    kept = [i for i in range(weight.ndim) if i not in picked]
    place = dict(zip(kept, numbers.offset_dims, strict=True)) | {RANK: w.ndim}
    update = mixed_einsum(
        hidden,
        [ascii_letters[i] for i in (*batch_axes, w.ndim)],
        far,
        [ascii_letters[place[i]] for i in far_labels],
        ascii_letters[: w.ndim],
        "" if token_axis is None else ascii_letters[batch_axes[token_axis]],
        dtype=hidden.dtype,
        precision=lax.Precision.HIGHEST,
    )
    interpreter.factored(weight, eqn)
    gain_axes = tuple(RANK if i == RANK else place[i] for i in weight.gain_axes)
    return dataclasses.replace(weight, w=w, gain_axes=gain_axes).plus(update)
