"""Higher-order primitives: rebuilt through JAX's public APIs around the same walk.

A virtual weight is a pytree, so it crosses the boundary of a ``jit`` or a ``checkpoint`` as it is,
in both directions. A scan takes its factors apart: the ones that hold the scanned axis are scanned
with ``W``, the others are constants of the loop.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_lora.adapter import RANK
from jax_lora.interpreter.core import Interpreter, open_jaxpr, rule
from jax_lora.virtual import LoraWeight


@rule("jit", "pjit")
def _jit(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    closed = eqn.params["jaxpr"]
    jaxpr, consts = open_jaxpr(closed)
    shardings = (eqn.params["in_shardings"], eqn.params["out_shardings"])
    if any(_specified(s) for side in shardings for s in side):
        # An inner jit that names shardings is inlined, with the same shardings as constraints.
        outs = interpreter.run(jaxpr, consts, _constrain(values, shardings[0]))
        return _constrain(outs, shardings[1])
    leaves, treedef = jax.tree.flatten(values)

    def build() -> Any:
        return lambda leaves: interpreter.run(jaxpr, consts, jax.tree.unflatten(treedef, leaves))

    return interpreter.jit(closed, eqn.params["name"], treedef, build)(leaves)


def _specified(sharding: Any) -> bool:
    return type(sharding).__name__ != "UnspecifiedValue"


def _constrain(values: list[Any], shardings: tuple[Any, ...]) -> list[Any]:
    def constrain(value: Any, sharding: Any) -> Any:
        if not _specified(sharding):
            return value
        if isinstance(value, LoraWeight):
            w = lax.with_sharding_constraint(value.w, sharding)
            return dataclasses.replace(value, w=w)
        return lax.with_sharding_constraint(value, sharding)

    return [constrain(v, s) for v, s in zip(values, shardings, strict=True)]


@rule("closed_call", "core_call", "core_closed_call", "call")
def _call(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    jaxpr, consts = open_jaxpr(eqn.params["call_jaxpr"])
    return interpreter.run(jaxpr, consts, values)


@rule("remat", "remat2", "checkpoint")
def _remat(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    jaxpr, consts = open_jaxpr(eqn.params["jaxpr"])

    def run(consts: list[Any], values: list[Any]) -> list[Any]:
        return interpreter.run(jaxpr, consts, values)

    remat = jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    return remat(list(consts), values)


def _split_scanned(weight: LoraWeight) -> tuple[Any, Any]:
    """A stacked weight as ``(scanned, rebuild)``: arrays with the scanned axis first, and back.

    A factor without axis 0 of the weight is the same for every step and stays a constant.
    """
    scanned: dict[str, Any] = {"w": weight.w}
    constant: dict[str, Any] = {"scale": weight.scale}
    labels: dict[str, tuple[int, ...]] = {}
    for name, (factor, axes) in zip("ab", weight.factors(), strict=True):
        if 0 in axes:
            scanned[name] = jnp.moveaxis(factor, axes.index(0), 0)
        else:
            constant[name] = factor
        labels[f"{name}_axes"] = tuple(i if i == RANK else i - 1 for i in axes if i != 0)

    def rebuild(step: dict[str, Any]) -> LoraWeight:
        merged: dict[str, Any] = {**step, **constant, **labels}
        return LoraWeight(**merged, path=weight.path)

    return scanned, rebuild


@rule("scan")
def _scan(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    params = eqn.params
    jaxpr, jaxpr_consts = open_jaxpr(params["jaxpr"])
    # The group sizes come from the shapes, not from params, whose names changed between versions:
    # scanned inputs and stacked outputs have one more axis outside than inside.
    num_xs = sum(_outer_axis(o, i) for o, i in zip(eqn.invars, jaxpr.invars, strict=True))
    num_ys = sum(_outer_axis(o, i) for o, i in zip(eqn.outvars, jaxpr.outvars, strict=True))
    num_carry = len(jaxpr.outvars) - num_ys
    num_consts = len(jaxpr.invars) - num_xs - num_carry
    consts, carry = values[:num_consts], values[num_consts : num_consts + num_carry]
    xs = values[num_consts + num_carry :]

    # A weight that is carried unchanged is a constant of the loop; one that changes is formed.
    fixed: dict[int, LoraWeight] = {}
    for k, value in enumerate(carry):
        if isinstance(value, LoraWeight):
            if jaxpr.outvars[k] is jaxpr.invars[num_consts + k]:
                fixed[k] = value
            else:
                carry[k] = interpreter.materialize(value, "scan carry")
    moving = [k for k in range(num_carry) if k not in fixed]
    split = [_split_scanned(x) if isinstance(x, LoraWeight) else (x, None) for x in xs]

    def body(state: list[Any], step: list[Any]) -> tuple[list[Any], list[Any]]:
        inner: dict[int, Any] = dict(zip(moving, state, strict=True)) | fixed
        xs_now = [s if back is None else back(s) for s, (_, back) in zip(step, split, strict=True)]
        args = [*consts, *(inner[k] for k in range(num_carry)), *xs_now]
        outs = interpreter.run(jaxpr, jaxpr_consts, args)
        state = [interpreter.materialize(outs[k], "scan carry") for k in moving]
        return state, [interpreter.materialize(y, "scan output") for y in outs[num_carry:]]

    options = {"_split_transpose": True} if params.get("_split_transpose") else {}
    state, ys = lax.scan(
        body,
        [carry[k] for k in moving],
        [scanned for scanned, _ in split],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
        **options,
    )
    done: dict[int, Any] = dict(zip(moving, state, strict=True)) | fixed
    return [*(done[k] for k in range(num_carry)), *ys]


def _outer_axis(outer: Any, inner: Any) -> bool:
    return len(outer.aval.shape) == len(inner.aval.shape) + 1
