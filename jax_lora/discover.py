"""Read each weight's axes from how the function uses it: no names, no layer types.

The function's jaxpr is followed without evaluating anything. Where a value that is a parameter in
another form meets a primitive that consumes it, a `Use` is recorded.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from jax_lora.adapter import Layout, leaves_by_path
from jax_lora.errors import ConfigError, expect_callable
from jax_lora.interpreter.control import scan_groups
from jax_lora.interpreter.core import CALLS, is_literal, open_jaxpr
from jax_lora.interpreter.lookup import picked_axes
from jax_lora.probes import Probe, Probes, joined, picked, restructured, united
from jax_lora.transform import FUNCTION, Traced

_ELEMENTWISE = {"add", "add_any", "sub", "mul", "div", "max", "min"}
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
            Of parameters that were concatenated, each has its share of a product; of a sum or an
            elementwise product of parameters, the first has all.
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

    Raises:
        ConfigError: ``fun`` is no function, or the size of an argument is symbolic.

    Example:
        >>> import jax.numpy as jnp
        >>> uses = discover(lambda p, x: x @ p["w"] + p["b"],
        ...                 {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}, jnp.ones((2, 4)))
        >>> use, = uses["w"]
        >>> use.primitive, use.in_axes, use.out_axes, use.multiply_adds
        ('dot_general', (0,), (1,), 24)
    """
    expect_callable(FUNCTION, fun)
    leaves, treedef = jax.tree.flatten(((params, *args), kwargs))
    shapes = [leaf.shape for leaf in leaves if hasattr(leaf, "shape")]
    symbolic = [s for s in shapes if not all(isinstance(n, numbers.Integral) for n in s)]
    if symbolic:
        raise ConfigError(
            f"expected example arguments whose sizes are numbers, got one of shape {symbolic[0]}; "
            "take any number where the parameters do not depend on it, as for a batch"
        )
    traced = Traced(fun, leaves, treedef)
    paths = list(leaves_by_path(params))
    arrays = [paths[i] for i in traced.array_leaves if i < len(paths)]
    walk = _Walk()
    inputs = [
        (Probe.of(paths[i], leaves[i].shape),) if i < len(paths) else ()
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


class _Walk:
    def __init__(self) -> None:
        self.uses: dict[str, list[Use]] = {}

    def run(
        self, jaxpr: Any, inputs: Sequence[Probes], data: Sequence[bool], steps: int
    ) -> list[Probes]:
        """The parameters that each output is in another form.

        ``data`` says of each input whether it depends on the function's other arguments. What a
        loop carries is taken to depend on them if anything in the loop does.
        """
        env: dict[Any, Probes] = dict(zip(jaxpr.invars, inputs, strict=True))
        depends = {var for var, flag in zip(jaxpr.invars, data, strict=True) if flag}
        for eqn in jaxpr.eqns:
            atoms = [None if is_literal(v) else v for v in eqn.invars]
            flags = [v in depends for v in atoms]
            if any(flags):
                depends.update(eqn.outvars)
            probes = [env.get(v, ()) for v in atoms]
            if any(probes):
                env.update(zip(eqn.outvars, self.follow(eqn, probes, flags, steps), strict=True))
        return [() if is_literal(v) else env.get(v, ()) for v in jaxpr.outvars]

    def follow(self, eqn: Any, probes: list[Probes], data: list[bool], steps: int) -> list[Probes]:
        name = eqn.primitive.name
        if name in CALLS:
            body = eqn.params.get(
                "jaxpr", eqn.params.get("call_jaxpr", eqn.params.get("fun_jaxpr"))
            )
            return self.run(open_jaxpr(body)[0], probes, data, steps)
        if name in _LOOPS:
            return getattr(self, _LOOPS[name])(eqn, probes, data, steps)
        if name == "optimization_barrier":
            return list(probes)
        if eqn.outvars and not any(probes[1:]):
            moved = [restructured(eqn, probe) for probe in probes[0]]
            if moved and None not in moved:
                return [tuple(p for p in moved if p is not None)] * len(eqn.outvars)
        after = joined(eqn, probes, data)
        outs: list[Probes] = [()] * len(eqn.outvars)
        for index, (group, kept) in enumerate(zip(probes, after, strict=True)):
            for probe in group:
                # An effect alone, such as a print, is no use.
                if eqn.outvars and all(k.path != probe.path for k in kept):
                    use = self.record(eqn, probes, index, probe, steps)
                    if use is not None and name == "gather":
                        outs[0] += picked(eqn, probe, use)
        return [united([*after, outs[0]]), *outs[1:]] if outs else []

    def scan(self, eqn: Any, probes: list[Probes], data: list[bool], steps: int) -> list[Probes]:
        body = open_jaxpr(eqn.params["jaxpr"])[0]
        inner = []
        for group, outside, inside in zip(probes, eqn.invars, body.invars, strict=True):
            if len(outside.aval.shape) == len(inside.aval.shape) + 1:
                group = tuple(probe.relabel(probe.axes[1:], probe.axes[0]) for probe in group)
            inner.append(group)
        consts, carry = scan_groups(eqn)
        data = [*data[:consts], *[any(data)] * carry, *data[consts + carry :]]
        outs = self.run(body, inner, data, steps * eqn.params["length"])
        before: dict[str, frozenset[int]] = {}
        for probe in (probe for group in probes for probe in group):
            before[probe.path] = before.get(probe.path, frozenset()) | probe.stack

        def stacked(probe: Probe) -> Probe:
            # What each step took one of, scanned or indexed, is side by side again.
            steps_axis = probe.stack - before[probe.path]
            return dataclasses.replace(
                probe, axes=(steps_axis, *probe.axes), stack=before[probe.path], lookup=None
            )

        return [
            tuple(stacked(p) if len(var.aval.shape) == len(p.axes) + 1 else p for p in group)
            for group, var in zip(outs, eqn.outvars, strict=True)
        ]

    def while_loop(
        self, eqn: Any, probes: list[Probes], data: list[bool], steps: int
    ) -> list[Probes]:
        params = eqn.params
        first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        data = [*data[:second], *[any(data)] * (len(data) - second)]
        condition, body = (open_jaxpr(params[name])[0] for name in ("cond_jaxpr", "body_jaxpr"))
        seen, reached = ([*values[:first], *values[second:]] for values in (probes, data))
        self.run(condition, seen, reached, steps)
        # How often the body runs is not known: its uses count once.
        return self.run(body, probes[first:], data[first:], steps)

    def cond(self, eqn: Any, probes: list[Probes], data: list[bool], steps: int) -> list[Probes]:
        for probe in probes[0]:
            self.record(eqn, probes, 0, probe, steps)
        branches = (open_jaxpr(branch)[0] for branch in eqn.params["branches"])
        outs = [self.run(branch, probes[1:], data[1:], steps) for branch in branches]
        return [united(groups) for groups in zip(*outs, strict=True)]

    def shard_map(
        self, eqn: Any, probes: list[Probes], data: list[bool], steps: int
    ) -> list[Probes]:
        # Shapes inside are those of one device's part; axes keep their roles.
        body = open_jaxpr(eqn.params["jaxpr"])[0]
        return self.run(body, probes, data, steps * eqn.params["mesh"].size)

    def record(
        self, eqn: Any, probes: list[Probes], index: int, probe: Probe, steps: int
    ) -> Use | None:
        """Note the use; None if it is one of looked-up rows, which are an activation."""
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
            indexed, paired = picked_axes(eqn)
            contracted = probe.behind(indexed)
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
            multiply_adds=steps * cost * probe.share.numerator // probe.share.denominator,
        )
        found = self.uses.setdefault(probe.path, [])
        if probe.lookup is not None:
            is_matrix = use.in_axes and use.out_axes and name != "gather"
            if not is_matrix or any(group for k, group in enumerate(probes) if k != index):
                return None
            if probe.lookup in found:
                found.remove(probe.lookup)
        found.append(use)
        return use
