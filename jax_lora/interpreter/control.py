"""Higher-order primitives: rebuilt through JAX's public APIs around the same walk.

A virtual weight is a pytree, so it crosses the boundary of a ``jit`` or a ``checkpoint`` as it is,
in both directions. A scan takes its factors apart: the ones that hold the scanned axis are scanned
with ``W``, the others are constants of the loop.

Formed are weights that a loop changes from step to step, those that a branch or a ``shard_map``
returns, and those that enter a function with a custom derivative: its rule is for the whole weight.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jax_lora.adapter import RANK
from jax_lora.interpreter.core import Interpreter, Unfactorable, open_jaxpr, rule
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


@rule("optimization_barrier")
def _barrier(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    return lax.optimization_barrier(values)


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

    What has no axis 0 of the weight is the same for every step and stays a constant.
    """
    scanned: dict[str, Any] = {"w": weight.w}
    constant: dict[str, Any] = {}
    labels: dict[str, tuple[int, ...]] = {}
    for name, (part, axes) in weight.parts().items():
        if 0 in axes:
            scanned[name] = jnp.moveaxis(part, axes.index(0), 0)
        else:
            constant[name] = part
        labels[name] = tuple(i if i == RANK else i - 1 for i in axes if i != 0)

    def rebuild(step: dict[str, Any]) -> LoraWeight:
        arrays: dict[str, Any] = {**step, **constant}
        parts = {name: (arrays[name], axes) for name, axes in labels.items()}
        return weight.with_parts(arrays["w"], parts)

    return scanned, rebuild


def scan_groups(eqn: Any) -> tuple[int, int]:
    """How many constants a scan has, the first of its inputs, and how many values it carries."""
    # From the shapes and not from params, whose names changed between versions: scanned inputs and
    # stacked outputs have one more axis outside than inside.
    jaxpr, _ = open_jaxpr(eqn.params["jaxpr"])
    num_xs = sum(_outer_axis(o, i) for o, i in zip(eqn.invars, jaxpr.invars, strict=True))
    num_ys = sum(_outer_axis(o, i) for o, i in zip(eqn.outvars, jaxpr.outvars, strict=True))
    num_carry = len(jaxpr.outvars) - num_ys
    return len(jaxpr.invars) - num_xs - num_carry, num_carry


@rule("scan")
def _scan(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    params = eqn.params
    jaxpr, jaxpr_consts = open_jaxpr(params["jaxpr"])
    num_consts, num_carry = scan_groups(eqn)
    consts, carry = values[:num_consts], values[num_consts : num_consts + num_carry]
    xs = values[num_consts + num_carry :]

    loop = _Carry(
        interpreter, carry, jaxpr.invars[num_consts:], jaxpr.outvars[:num_carry], "scan carry"
    )
    split = [_split_scanned(x) if isinstance(x, LoraWeight) else (x, None) for x in xs]
    stacked: list[Any] = []

    def body(state: list[Any], step: list[Any]) -> tuple[list[Any], list[Any]]:
        xs_now = [s if back is None else back(s) for s, (_, back) in zip(step, split, strict=True)]
        args = [*consts, *loop.full(state), *xs_now]
        outs = interpreter.run(jaxpr, jaxpr_consts, args)
        ys = outs[num_carry:]
        stacked[:] = [_stacked(y) for y in ys]
        return loop.next(outs[:num_carry]), [_pack_output(y) for y in ys]

    options = {"_split_transpose": True} if params.get("_split_transpose") else {}
    state, ys = lax.scan(
        body,
        loop.initial,
        [scanned for scanned, _ in split],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
        **options,
    )
    outputs = [y if back is None else back(y) for y, back in zip(ys, stacked, strict=True)]
    return [*loop.full(state), *outputs]


def _pack_output(y: Any) -> Any:
    """A step's output as arrays; a weight's scale may differ from step to step, so b takes it."""
    if not isinstance(y, LoraWeight):
        return y
    arrays = {name: part for name, (part, _) in y.parts().items()}
    return arrays | {"w": y.w, "b": y.b * y.scale.astype(y.b.dtype)}


def _stacked(y: Any) -> Any:
    """How a step's weight is made of the arrays of all steps; None if it is an array."""
    if not isinstance(y, LoraWeight):
        return None
    labels = {
        name: (0, *(i if i == RANK else i + 1 for i in axes))
        for name, (_, axes) in y.parts().items()
    }
    frame = jax.tree.map(lambda _: None, y)  # without its arrays, which are those of the step

    def rebuild(ys: dict[str, Any]) -> LoraWeight:
        parts = {name: (ys[name], axes) for name, axes in labels.items()}
        return frame.with_parts(ys["w"], parts, scale=jnp.ones((), ys["b"].dtype))

    return rebuild


class _Carry:
    """What a loop carries, without the weights that it carries unchanged.

    Those are constants of the loop; a weight that changes from step to step is formed.
    """

    def __init__(
        self, interpreter: Interpreter, values: list[Any], invars: Any, outvars: Any, name: str
    ):
        self._interpreter, self._name = interpreter, name
        self._fixed = {
            k: value
            for k, value in enumerate(values)
            if isinstance(value, LoraWeight) and outvars[k] is invars[k]
        }
        self._moving = [k for k in range(len(values)) if k not in self._fixed]
        self.initial = self.next(values)

    def next(self, values: list[Any]) -> list[Any]:
        """Of all carried values, those that the loop has to carry, formed."""
        return [self._interpreter.materialize(values[k], self._name) for k in self._moving]

    def full(self, state: list[Any]) -> list[Any]:
        """All carried values, from those that the loop carries."""
        values = self._fixed | dict(zip(self._moving, state, strict=True))
        return [values[k] for k in sorted(values)]


def _outer_axis(outer: Any, inner: Any) -> bool:
    return len(outer.aval.shape) == len(inner.aval.shape) + 1


@rule("while")
def _while(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    params = eqn.params
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_jaxpr, cond_jaxpr_consts = open_jaxpr(params["cond_jaxpr"])
    body_jaxpr, body_jaxpr_consts = open_jaxpr(params["body_jaxpr"])
    cond_consts, body_consts, carry = values[:first], values[first:second], values[second:]
    carried = body_jaxpr.invars[params["body_nconsts"] :]
    loop = _Carry(interpreter, carry, carried, body_jaxpr.outvars, "while carry")

    def cond(state: list[Any]) -> Any:
        args = [*cond_consts, *loop.full(state)]
        (out,) = interpreter.run(cond_jaxpr, cond_jaxpr_consts, args)
        return interpreter.materialize(out, "while condition")

    def body(state: list[Any]) -> list[Any]:
        args = [*body_consts, *loop.full(state)]
        return loop.next(interpreter.run(body_jaxpr, body_jaxpr_consts, args))

    return loop.full(lax.while_loop(cond, body, loop.initial))


@rule("cond")
def _cond(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    index, *operands = values
    if isinstance(index, LoraWeight) or eqn.params.get("branches_platforms") is not None:
        raise Unfactorable  # of branches for platforms, only one may be lowered

    def branch(closed: Any) -> Any:
        jaxpr, consts = open_jaxpr(closed)

        def run(operands: list[Any]) -> list[Any]:
            outs = interpreter.run(jaxpr, consts, operands)
            return [interpreter.materialize(out, "cond output") for out in outs]

        return run

    return lax.switch(index, [branch(closed) for closed in eqn.params["branches"]], operands)


@rule("shard_map")
def _shard_map(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    params = eqn.params
    jaxpr, consts = open_jaxpr(params["jaxpr"])

    def specs_of(value: Any, spec: Any) -> Any:
        """Each factor is split like the axes of the weight that it holds; the rank is whole."""
        if not isinstance(value, LoraWeight):
            return spec
        axes = (*spec, *[None] * (value.ndim - len(spec)))

        def of(labels: tuple[int, ...]) -> PartitionSpec:
            return PartitionSpec(*[None if i == RANK else axes[i] for i in labels])

        parts = {name: (of(labels), labels) for name, (_, labels) in value.parts().items()}
        return value.with_parts(spec, parts, scale=of(()))  # type: ignore[arg-type]

    def run(*args: Any) -> tuple[Any, ...]:
        outs = interpreter.run(jaxpr, consts, args)
        return tuple(interpreter.materialize(out, "shard_map output") for out in outs)

    options = {"check_vma": params["check_vma"]} if "check_vma" in params else {}
    manual = params.get("newly_manual_axes", params.get("manual_axes"))
    if manual is not None:
        options["axis_names"] = set(manual)
    mapped = jax.shard_map(
        run,
        mesh=params["mesh"],
        in_specs=tuple(map(specs_of, values, params["in_specs"])),
        out_specs=tuple(params["out_specs"]),
        **options,
    )
    return list(mapped(*values))
