"""What is still a parameter on its way through a function: in another form, or joined with others.

Every axis of a value that is a parameter in another form carries the set of the parameter's own
axes behind it. An operation moves them, joins them with those of other parameters, or consumes the
value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Iterable, Sequence
from fractions import Fraction
from typing import Any

from jax_lora.interpreter.lookup import is_strided_slice, picked_axes
from jax_lora.interpreter.structural import reshape_groups, reshape_order

_Axes = tuple[frozenset[int], ...]
#: Primitives that a weight passes through unchanged in shape, if no other array joins in.
_UNARY = {"convert_element_type", "copy", "copy_p", "name", "sharding_constraint"}
_UNARY |= {"stop_gradient", "neg", "reduce_precision", "rev", "pvary", "pcast"}
_UNARY |= {"reshard", "mesh_cast"}
#: Primitives that change some entries of their first operand, or put more beside them.
_FIRST = {"pad", "tile", "cumsum", "dynamic_update_slice"}
_FIRST |= {"scatter", "scatter-add", "scatter_add", "scatter-mul", "scatter_mul"}
#: Primitives that compute each entry from those at the same place.
_POINTWISE = {"abs", "add", "add_any", "cbrt", "clamp", "div", "erf", "exp", "exp2", "expm1"}
_POINTWISE |= {"floor", "integer_pow", "log", "log1p", "logistic", "max", "min", "mul", "pow"}
_POINTWISE |= {"round", "rsqrt", "select_n", "sign", "sin", "cos", "sqrt", "square", "sub", "tanh"}


@dataclasses.dataclass(frozen=True)
class Probe:
    """A value that is a parameter in another form.

    Attributes:
        path: The parameter's path.
        axes: For each axis of the value, the parameter's axes behind it.
        stack: The parameter's axes that hold independent matrices.
        lookup: If the value was looked up, that use of the parameter: it is none if the value turns
            out to be matrices picked from a stack, and not an embedding's rows.
        share: The parameter's share of what it costs to use the value.
    """

    path: str
    axes: _Axes
    stack: frozenset[int] = frozenset()
    lookup: Hashable = None
    share: Fraction = Fraction(1)

    @classmethod
    def of(cls, path: str, shape: Sequence[int]) -> Probe:
        """The parameter itself."""
        return cls(path, tuple(frozenset({i}) for i in range(len(shape))))

    def behind(self, axes: Iterable[int]) -> frozenset[int]:
        """The parameter's axes behind some axes of this value."""
        return frozenset().union(*(self.axes[i] for i in axes))

    def relabel(self, axes: Iterable[frozenset[int]], stack: frozenset[int] | None = None) -> Probe:
        """The value with other axes, and some more of the parameter's as stack-axes."""
        stack = self.stack if stack is None else self.stack | stack
        return dataclasses.replace(self, axes=tuple(axes), stack=stack)


#: The parameters that a value is in another form: none, mostly one, several where they were joined.
Probes = tuple[Probe, ...]


def united(groups: Iterable[Probes]) -> Probes:
    """All of them, one for each parameter: the first, with the shares of the others."""
    found: dict[str, Probe] = {}
    for probe in (probe for group in groups for probe in group):
        first = found.get(probe.path)
        if first is not None:
            probe = dataclasses.replace(first, share=first.share + probe.share)
        found[probe.path] = probe
    return tuple(found.values())


def picked(eqn: Any, probe: Probe, use: Hashable) -> Probes:
    """What a gather looks up, if it can be matrices picked from a stack."""
    numbers = eqn.params["dimension_numbers"]
    indexed, paired = picked_axes(eqn)
    kept = [i for i in range(len(probe.axes)) if i not in (*numbers.collapsed_slice_dims, *paired)]
    if len(kept) < 2 or not indexed <= set(numbers.collapsed_slice_dims):
        return ()
    axes = [frozenset[int]()] * len(eqn.outvars[0].aval.shape)
    for i, place in zip(kept, numbers.offset_dims, strict=True):
        axes[place] = probe.axes[i]
    stack = probe.stack | probe.behind((*indexed, *paired))
    return (dataclasses.replace(probe, axes=tuple(axes), stack=stack, lookup=use),)


def joined(eqn: Any, probes: list[Probes], data: list[bool]) -> list[Probes]:
    """Of each operand, what the result still is: a weight that was masked, summed, concatenated.

    That is so if no input reaches what it is joined with; a scalar factor may depend on one.
    """
    if not eqn.outvars:
        return [()] * len(probes)
    kept = [
        tuple(part for probe in group if (part := _part(eqn, index, probe)) is not None)
        for index, group in enumerate(probes)
    ]
    scaled = eqn.primitive.name in ("mul", "div")
    for reached, group, atom in zip(data, kept, eqn.invars, strict=True):
        if reached and not group and (atom.aval.shape or not scaled):
            return [()] * len(probes)
    if eqn.primitive.name in _POINTWISE:
        # A product with a sum of parameters costs as much as with one.
        first = next((k for k, group in enumerate(kept) if group), 0)
        free = [tuple(dataclasses.replace(p, share=Fraction(0)) for p in group) for group in kept]
        kept = [group if k == first else free[k] for k, group in enumerate(kept)]
    return kept


def _part(eqn: Any, index: int, probe: Probe) -> Probe | None:
    """What a result still has of an operand that is a parameter; None if nothing."""
    name, params = eqn.primitive.name, eqn.params
    before, after = eqn.invars[index].aval.shape, eqn.outvars[0].aval.shape
    if name in _POINTWISE:
        # A gain has no axis of its own where the weight has one: it acts on a weight and is none.
        covers = all(axes or n == 1 for axes, n in zip(probe.axes, before, strict=True))
        return probe if before == after and covers else None
    if name in ("concatenate", "stack"):
        axes, stack = probe.axes, probe.stack
        if name == "stack":
            axes = (*axes[: params["axis"]], frozenset(), *axes[params["axis"] :])
        else:  # what was taken one by one is side by side again
            stack -= axes[params["dimension"]]
        share = probe.share * Fraction(math.prod(before), max(math.prod(after), 1))
        return dataclasses.replace(probe, axes=axes, stack=stack, share=share)
    return probe if name in _FIRST and index == 0 else None


def restructured(eqn: Any, probe: Probe) -> Probe | None:
    """The probe after an operation that only moves entries around; None if it does more."""
    name, params = eqn.primitive.name, eqn.params
    shape = tuple(eqn.outvars[0].aval.shape)
    if name in _UNARY:
        return probe
    if name == "transpose":
        return probe.relabel(probe.axes[i] for i in params["permutation"])
    if name in ("reshape", "squeeze"):
        axes = [frozenset[int]()] * len(shape)
        order, gone = reshape_order(eqn), frozenset[int]()
        for old, new in reshape_groups([eqn.invars[0].aval.shape[i] for i in order], shape):
            behind = probe.behind(order[k] for k in old)
            gone |= frozenset() if new else behind
            for axis in new:
                axes[axis] = behind
        return probe.relabel(axes, stack=gone)  # w[0] of a stack of one layer
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
