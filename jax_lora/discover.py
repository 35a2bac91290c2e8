"""Read each weight's axes from how the function uses it: no names, no layer types.

The function's jaxpr is followed without evaluating anything. Every axis of every value that is a
parameter in another form carries the set of the parameter's own axes behind it; where such a value
meets a primitive that consumes it, a `Use` is recorded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from jax_lora.adapter import Layout, leaves_by_path
from jax_lora.interpreter.core import is_literal, open_jaxpr
from jax_lora.interpreter.lookup import is_strided_slice, picked_axes
from jax_lora.interpreter.structural import reshape_groups
from jax_lora.transform import Traced

_Axes = tuple[frozenset[int], ...]
#: Primitives that a weight passes through unchanged in shape, if no other array joins in.
_UNARY = {"convert_element_type", "copy", "copy_p", "name", "sharding_constraint"}
_UNARY |= {"stop_gradient", "neg", "reduce_precision", "rev", "pvary", "pcast"}
_UNARY |= {"reshard", "mesh_cast"}
_ELEMENTWISE = {"add", "add_any", "sub", "mul", "div", "max", "min"}
_CALLS = {"jit", "pjit", "remat", "remat2", "checkpoint", "closed_call", "core_call", "call"}
_CALLS |= {"core_closed_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}


_LOOPS = {"scan": "scan", "while": "while_loop", "cond": "cond", "shard_map": "shard_map"}
#: Primitives whose use of a parameter gives it a layout, and what such a use is called.
MATRIX_USES = {
    "dot_general": "linear",
    "ragged_dot_general": "linear",
    "conv_general_dilated": "convolution",
    "gather": "embedding",
}


@dataclasses.dataclass(frozen=True)
class Use:
    """One place where a function consumes a parameter.

    Attributes:
        primitive: The primitive's name.
        in_axes: The parameter's axes that are contracted.
        out_axes: The parameter's axes that the result keeps.
        stack_axes: The parameter's axes that are batched, scanned or indexed.
        input_shape: The shape of the other operand, of one step if the use is inside a scan.
        output_shape: The shape of the result, of one step if the use is inside a scan.
        output_bytes: The bytes of the result, of one step if the use is inside a scan.
        multiply_adds: The multiply-adds of all steps. A contraction costs one for each output
            element and contracted index; an elementwise use costs one for each output element.
    """

    primitive: str
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    stack_axes: tuple[int, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    output_bytes: int
    multiply_adds: int

    def layout(self, shape: tuple[int, ...]) -> Layout | None:
        """The layout this use gives a weight of ``shape``; None if it is not a matrix product."""
        roles = (*self.in_axes, *self.out_axes, *self.stack_axes)
        if self.primitive not in MATRIX_USES or sorted(roles) != list(range(len(shape))):
            return None
        if not self.in_axes or not self.out_axes:
            return None
        return Layout(shape, self.in_axes, self.out_axes, self.stack_axes)


def discover(
    fun: Callable[..., Any], params: Any, *args: Any, **kwargs: Any
) -> dict[str, tuple[Use, ...]]:
    """How ``fun(params, *args, **kwargs)`` uses each parameter, by the parameter's path.

    Args:
        fun: A pure function whose first argument is a pytree of parameters.
        params: The parameters; arrays or `jax.ShapeDtypeStruct`.
        *args: The other arguments; arrays may be `jax.ShapeDtypeStruct`.
        **kwargs: The keyword arguments, likewise.

    Returns:
        The uses of every parameter, parameters and uses in the order of the program; at the end,
        with an empty tuple, the parameters that the function never uses. Leaves of ``params`` that
        are not arrays are left out.

    Example:
        >>> import jax.numpy as jnp
        >>> uses = discover(lambda p, x: x @ p["w"] + p["b"],
        ...                 {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}, jnp.ones((2, 4)))
        >>> use, = uses["w"]
        >>> use.primitive, use.in_axes, use.out_axes, use.multiply_adds
        ('dot_general', (0,), (1,), 24)
    """
    leaves, treedef = jax.tree.flatten(((params, *args), kwargs))
    traced = Traced(fun, leaves, treedef)
    paths = list(leaves_by_path(params))
    arrays = [paths[i] for i in traced.array_leaves if i < len(paths)]
    walk = _Walk()
    inputs = [
        _Probe.of(paths[i], leaves[i].shape) if i < len(paths) else None
        for i in traced.array_leaves
    ]
    walk.run(traced.jaxpr, inputs, [i >= len(paths) for i in traced.array_leaves], steps=1)
    found = {path: tuple(uses) for path, uses in walk.uses.items()}
    return found | {path: () for path in arrays if path not in found}


def low_rank_multiply_adds(layout: Layout, rank: int, uses: Iterable[Use]) -> int:
    """The multiply-adds of ``(x a) b`` in a forward pass, for all uses of a weight as ``x W``.

    ``x W`` costs ``fan_in * fan_out`` for each row of ``x``, and ``(x a) b`` costs
    ``rank * (fan_in + fan_out)``.
    """
    dense = sum(use.multiply_adds for use in uses if use.in_axes)
    rows = dense // (layout.fan_in * layout.fan_out)
    return rows * rank * (layout.fan_in + layout.fan_out)


@dataclasses.dataclass(frozen=True)
class _Probe:
    """A value that is a parameter in another form.

    Attributes:
        path: The parameter's path.
        axes: For each axis of the value, the parameter's axes behind it.
        stack: The parameter's axes that hold independent matrices.
        lookup: If the value was looked up, that use of the parameter: it is none if the value turns
            out to be matrices picked from a stack, and not an embedding's rows.
    """

    path: str
    axes: _Axes
    stack: frozenset[int] = frozenset()
    lookup: Use | None = None

    @classmethod
    def of(cls, path: str, shape: Sequence[int]) -> _Probe:
        return cls(path, tuple(frozenset({i}) for i in range(len(shape))))

    def behind(self, axes: Iterable[int]) -> frozenset[int]:
        """The parameter's axes behind some axes of this value."""
        return frozenset().union(*(self.axes[i] for i in axes))

    def relabel(
        self, axes: Iterable[frozenset[int]], stack: frozenset[int] | None = None
    ) -> _Probe:
        stack = self.stack if stack is None else self.stack | stack
        return dataclasses.replace(self, axes=tuple(axes), stack=stack)


class _Walk:
    def __init__(self) -> None:
        self.uses: dict[str, list[Use]] = {}

    def run(
        self, jaxpr: Any, inputs: Sequence[_Probe | None], data: Sequence[bool], steps: int
    ) -> list[_Probe | None]:
        """The outputs that are parameters in another form.

        ``data`` says of each input whether it depends on the function's other arguments; loops
        say so of all inputs if it is true of one.
        """
        env: dict[Any, _Probe] = {}
        depends = {var for var, flag in zip(jaxpr.invars, data, strict=True) if flag}
        for var, probe in zip(jaxpr.invars, inputs, strict=True):
            if probe is not None:
                env[var] = probe
        for eqn in jaxpr.eqns:
            atoms = [None if is_literal(v) else v for v in eqn.invars]
            flags = [v in depends for v in atoms]
            if any(flags):
                depends.update(eqn.outvars)
            probes = [env.get(v) for v in atoms]
            if any(p is not None for p in probes):
                outs = self.follow(eqn, probes, flags, steps)
                env.update({v: p for v, p in zip(eqn.outvars, outs, strict=True) if p is not None})
        return [None if is_literal(v) else env.get(v) for v in jaxpr.outvars]

    def body(
        self, closed: Any, probes: Sequence[_Probe | None], data: Sequence[bool], steps: int
    ) -> list[_Probe | None]:
        """`run` of the jaxpr of a loop or a branch."""
        return self.run(open_jaxpr(closed)[0], probes, [any(data)] * len(probes), steps)

    def follow(
        self, eqn: Any, probes: list[_Probe | None], data: list[bool], steps: int
    ) -> list[_Probe | None]:
        name = eqn.primitive.name
        if name in _CALLS:
            body = eqn.params.get(
                "jaxpr", eqn.params.get("call_jaxpr", eqn.params.get("fun_jaxpr"))
            )
            return self.run(open_jaxpr(body)[0], probes, data, steps)
        if name in _LOOPS:
            return getattr(self, _LOOPS[name])(eqn, probes, data, steps)
        first = probes[0]
        if first is not None and eqn.outvars and all(p is None for p in probes[1:]):
            moved = _restructure(eqn, first)
            if moved is not None:
                return [moved] * len(eqn.outvars)
        if name in ("add", "add_any", "sub"):
            # With a term that no input reaches, the sum is still a weight.
            for index, other in ((0, 1), (1, 0)):
                same = eqn.invars[index].aval.shape == eqn.invars[other].aval.shape
                if probes[index] is not None and probes[other] is None and same and not data[other]:
                    return [probes[index]]
        scaled: list[_Probe | None] = [None] * len(eqn.outvars)
        if name in ("mul", "div"):
            # By a scalar, which may be a parameter too, a weight is only scaled.
            for index, other in ((0, 1), (1, 0)):
                if probes[index] is not None and _is_scalar(eqn.invars[other]):
                    scaled, probes[index] = [probes[index]], None
                    break
        for index, probe in enumerate(probes):
            if probe is not None and eqn.outvars:  # an effect alone, such as a print, is no use
                use = self.record(eqn, probes, index, steps)
                if use is not None and name == "gather":
                    return [_picked(eqn, probe, use)]
        return scaled

    def scan(
        self, eqn: Any, probes: list[_Probe | None], data: list[bool], steps: int
    ) -> list[_Probe | None]:
        body = open_jaxpr(eqn.params["jaxpr"])[0]
        inner: list[_Probe | None] = []
        for probe, outside, inside in zip(probes, eqn.invars, body.invars, strict=True):
            if probe is not None and len(outside.aval.shape) == len(inside.aval.shape) + 1:
                probe = probe.relabel(probe.axes[1:], stack=probe.axes[0])
            inner.append(probe)
        outs = self.body(eqn.params["jaxpr"], inner, data, steps * eqn.params["length"])
        before: dict[str, frozenset[int]] = {}
        for probe in probes:
            if probe is not None:
                before[probe.path] = before.get(probe.path, frozenset()) | probe.stack
        for k, (probe, outside) in enumerate(zip(outs, eqn.outvars, strict=True)):
            if probe is not None and len(outside.aval.shape) == len(probe.axes) + 1:
                # What each step took one of, scanned or indexed, is side by side again.
                steps_axis = probe.stack - before[probe.path]
                outs[k] = _Probe(probe.path, (steps_axis, *probe.axes), before[probe.path])
        return outs

    def while_loop(
        self, eqn: Any, probes: list[_Probe | None], data: list[bool], steps: int
    ) -> list[_Probe | None]:
        params = eqn.params
        first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        carry = probes[second:]
        self.body(params["cond_jaxpr"], [*probes[:first], *carry], data, steps)
        # How often the body runs is not known: its uses count once.
        return self.body(params["body_jaxpr"], probes[first:], data, steps)

    def cond(
        self, eqn: Any, probes: list[_Probe | None], data: list[bool], steps: int
    ) -> list[_Probe | None]:
        if probes[0] is not None:
            self.record(eqn, probes, 0, steps)
        outs = [self.body(b, probes[1:], data, steps) for b in eqn.params["branches"]]
        return [next((p for p in out if p is not None), None) for out in zip(*outs, strict=True)]

    def shard_map(
        self, eqn: Any, probes: list[_Probe | None], data: list[bool], steps: int
    ) -> list[_Probe | None]:
        # Shapes inside are those of one device's part; axes keep their roles.
        return self.body(eqn.params["jaxpr"], probes, data, steps * eqn.params["mesh"].size)

    def record(self, eqn: Any, probes: list[_Probe | None], index: int, steps: int) -> Use | None:
        """Note the use; None if it is one of looked-up rows, which are an activation."""
        probe = probes[index]
        assert probe is not None
        name = eqn.primitive.name
        result = eqn.outvars[0].aval
        output = tuple(result.shape)
        others = [tuple(v.aval.shape) for k, v in enumerate(eqn.invars) if k != index]
        contracted: frozenset[int] = frozenset()
        kept, stacked, cost = probe.behind(range(len(probe.axes))), probe.stack, 0
        if name == "dot_general":
            contract, batch = eqn.params["dimension_numbers"]
            free = [i for i in range(len(probe.axes)) if i not in (*contract[index], *batch[index])]
            contracted, kept = probe.behind(contract[index]), probe.behind(free)
            stacked = stacked | probe.behind(batch[index])
            sizes = eqn.invars[index].aval.shape
            cost = math.prod(output) * math.prod(sizes[i] for i in contract[index])
        elif name == "conv_general_dilated" and index == 1:
            numbers = eqn.params["dimension_numbers"]
            out_axis, *summed = numbers.rhs_spec
            contracted, kept = probe.behind(summed), probe.axes[out_axis]
            sizes = eqn.invars[index].aval.shape
            cost = math.prod(output) * math.prod(sizes[i] for i in summed)
        elif name == "ragged_dot_general" and index == 1:
            numbers = eqn.params["ragged_dot_dimension_numbers"]
            summed = numbers.dot_dimension_numbers[0][1]
            groups = numbers.rhs_group_dimensions
            free = [i for i in range(len(probe.axes)) if i not in (*summed, *groups)]
            contracted, kept = probe.behind(summed), probe.behind(free)
            stacked = stacked | probe.behind(groups)
            sizes = eqn.invars[index].aval.shape
            cost = math.prod(output) * math.prod(sizes[i] for i in summed)
        elif name == "gather" and index == 0:
            # Looking up rows is a product with one-hot rows: the indexed axes are the inputs.
            picked, paired = picked_axes(eqn)
            contracted = probe.behind(picked)
            stacked = stacked | probe.behind(paired)
            kept = kept - contracted - stacked
        elif name in _ELEMENTWISE:
            cost = math.prod(output)
        use = Use(
            name,
            in_axes=tuple(sorted(contracted)),
            out_axes=tuple(sorted(kept)),
            stack_axes=tuple(sorted(stacked)),
            input_shape=others[0] if others else output,
            output_shape=output,
            output_bytes=math.prod(output) * result.dtype.itemsize,
            multiply_adds=steps * cost,
        )
        found = self.uses.setdefault(probe.path, [])
        if probe.lookup is not None:
            is_matrix = use.in_axes and use.out_axes and name != "gather"
            if not is_matrix or any(p is not None for k, p in enumerate(probes) if k != index):
                return None
            if probe.lookup in found:
                found.remove(probe.lookup)
        found.append(use)
        return use


def _picked(eqn: Any, probe: _Probe, use: Use) -> _Probe | None:
    """What a gather looks up, if it can be matrices picked from a stack; else None."""
    numbers = eqn.params["dimension_numbers"]
    picked, paired = picked_axes(eqn)
    kept = [i for i in range(len(probe.axes)) if i not in (*numbers.collapsed_slice_dims, *paired)]
    if len(kept) < 2 or not picked <= set(numbers.collapsed_slice_dims):
        return None
    axes = [frozenset[int]()] * len(eqn.outvars[0].aval.shape)
    for i, place in zip(kept, numbers.offset_dims, strict=True):
        axes[place] = probe.axes[i]
    stack = probe.stack | probe.behind((*picked, *paired))
    return _Probe(probe.path, tuple(axes), stack, lookup=use)


def _is_scalar(atom: Any) -> bool:
    return not atom.aval.shape


def _restructure(eqn: Any, probe: _Probe) -> _Probe | None:
    """The probe after an operation that only moves entries around; None if it does more."""
    name, params = eqn.primitive.name, eqn.params
    shape = tuple(eqn.outvars[0].aval.shape)
    if name in _UNARY:
        return probe
    if name == "transpose":
        return probe.relabel(probe.axes[i] for i in params["permutation"])
    if name in ("reshape", "squeeze"):
        axes = [frozenset[int]()] * len(shape)
        for old, new in reshape_groups(tuple(eqn.invars[0].aval.shape), shape):
            for axis in new:
                axes[axis] = probe.behind(old)
        return probe.relabel(axes)
    if name == "broadcast_in_dim":
        axes = [frozenset[int]()] * len(shape)
        for index, axis in enumerate(params["broadcast_dimensions"]):
            axes[axis] = probe.axes[index]
        return probe.relabel(axes)
    if name == "all_gather" and params["tiled"]:
        return probe
    if name == "gather" and is_strided_slice(eqn):
        numbers = params["dimension_numbers"]
        (picked,) = numbers.start_index_map
        rest = iter(i for i in range(len(probe.axes)) if i != picked)
        order = [next(rest) if k in numbers.offset_dims else picked for k in range(len(shape))]
        return probe.relabel(probe.axes[i] for i in order)
    if name in ("slice", "dynamic_slice", "split"):
        # An axis of which one entry is taken holds independent matrices.
        before = eqn.invars[0].aval.shape
        taken = [i for i, n in enumerate(shape) if n == 1 < before[i]]
        return probe.relabel(probe.axes, stack=probe.behind(taken))
    return None
