"""Looking up rows of a weight: an embedding stays factored, as does a layer picked from a stack."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_lora.adapter import RANK
from jax_lora.interpreter.core import Interpreter, Unfactorable, evaluate_one, rule
from jax_lora.interpreter.structural import only_first


@rule("gather")
def _gather(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    weight = only_first(values)
    indices, params = values[1], eqn.params
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    picked = set(numbers.collapsed_slice_dims)
    whole = all(sizes[i] == weight.shape[i] for i in range(weight.ndim) if i not in picked)
    batching = getattr(numbers, "operand_batching_dims", ())
    if not whole or batching or set(numbers.start_index_map) != picked:
        raise Unfactorable  # a window, or a start index along an axis that is kept

    (w,) = evaluate_one(eqn, [weight.w, indices])
    batch_axes = [i for i in range(w.ndim) if i not in numbers.offset_dims]
    kept = [i for i in range(weight.ndim) if i not in picked]
    out_axis = dict(zip(kept, numbers.offset_dims, strict=True)) | {RANK: RANK}

    def take(factor: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, list[int]]:
        """The factor with the axes it has of the picked ones looked up, the batch in front."""
        columns = [k for k, i in enumerate(numbers.start_index_map) if i in axes]
        rest = [i for i in axes if i not in picked]
        labels = [out_axis[i] for i in rest]
        if not columns:
            return factor, labels
        found = [axes.index(numbers.start_index_map[k]) for k in columns]
        rank_of = {axis: n for n, axis in enumerate(sorted(found))}
        batch = indices.ndim - 1
        gathered = lax.gather(
            factor,
            indices[..., jnp.array(columns)],
            lax.GatherDimensionNumbers(
                offset_dims=tuple(range(batch, batch + len(rest))),
                collapsed_slice_dims=tuple(sorted(found)),
                start_index_map=tuple(found),
            ),
            slice_sizes=tuple(1 if k in rank_of else n for k, n in enumerate(factor.shape)),
            indices_are_sorted=params["indices_are_sorted"],
            unique_indices=False,
            mode=params["mode"],
            # Out of bounds the base has its fill value, NaN by default, and the update adds 0.
            fill_value=0,
        )
        return gathered, [*batch_axes, *labels]

    looked_up = weight.map_factors(w, take)
    if all(picked & set(axes) for _, axes in weight.factors()):
        return [looked_up]  # matrices picked from a stack: still a weight
    interpreter.factored(weight, eqn)
    return [looked_up.materialize()]
