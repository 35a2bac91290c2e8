"""Where each of torch's parameters is among ours, and how its axes lie there.

All transposes between the two worlds are in this file.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jax_lora.adapter import Layout, leaves_by_path
from jax_lora.discover import MATRIX_USES, Use
from jax_lora.errors import ConfigError
from jax_lora.peft.names import Kind, Name, Rules

_KIND_OF_USE: dict[str, Kind] = {
    "linear": "linear",
    "convolution": "conv",
    "embedding": "embedding",
}
#: What helps where the roles of a parameter's axes are not known.
ROLES = "pass layouts=jl.discover(fun, params, x), or say kind= and axes= in its rule"
#: Why a matrix is not written without knowing what it is in torch.
UNSURE = f"whether it is a linear layer, an embedding or a convolution is not known; {ROLES}"


@dataclasses.dataclass(frozen=True)
class Place:
    """One parameter of the torch model, and where it is in ours.

    Attributes:
        name: Its name in torch.
        path: The path of the parameter that it is, or is a part of.
        index: Its place in the stack.
        shape: The shape of the parameter at that path.
        kind: What its module is.
        layout: The roles of the parameter's axes; None if they are not known.
        order: For each in-axis of torch's weight, its place among the layout's.
        stacked: The number of stack-axes.
        used_as: As what kinds of module the parameter is used.
        sure: Whether the kind is known, from its rule or its use, and not assumed.
        columns: The first and the last but one of our outputs that are its; None for all.
        flat: Whether it is one axis in torch although it is several here: the bias of such outputs.
    """

    name: str
    path: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    kind: Kind
    layout: Layout | None
    order: tuple[int, ...]
    stacked: int
    used_as: frozenset[str] = frozenset()
    sure: bool = True
    columns: tuple[int, int] | None = None
    flat: bool = False

    @property
    def module(self) -> str:
        """The module it belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def is_weight(self) -> bool:
        """Whether it is what LoRA adapts of its module."""
        return self.name.endswith(".weight")

    @property
    def is_bias(self) -> bool:
        """Whether it is the bias of its module."""
        return self.name.endswith(".bias")

    @property
    def is_tied(self) -> bool:
        """Whether it is a table and a head in one."""
        return self.used_as == {"embedding", "linear"}

    @property
    def matrix(self) -> Layout:
        """The layout, where there has to be one."""
        assert self.layout is not None
        return self.layout

    @property
    def stack_axes(self) -> tuple[int, ...]:
        """The axes that hold one such parameter each."""
        return tuple(range(self.stacked)) if self.layout is None else self.layout.stack_axes

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of these axes."""
        return tuple(self.shape[i] for i in self.stack_axes)

    @property
    def outs(self) -> slice:
        """Its outputs among the flattened ones of our parameter."""
        return slice(*self.columns) if self.columns else slice(None)

    @property
    def fan_out(self) -> int:
        """The number of its outputs."""
        begin, end = self.columns or (0, self.matrix.fan_out)
        return end - begin

    @property
    def rest(self) -> tuple[int, ...]:
        """Our axes without those of the stack."""
        return tuple(i for i in range(len(self.shape)) if i not in self.stack_axes)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of our parameter, or of one of the stack."""
        return tuple(self.shape[i] for i in self.rest)

    @property
    def where(self) -> tuple[Any, ...]:
        """The index of its part of our parameter."""
        at = dict(zip(self.stack_axes, self.index, strict=True))
        return tuple(at.get(i, slice(None)) for i in range(len(self.shape)))

    def problem_of_factors(self, *, tied: bool = False) -> str:
        """Why it cannot have factors that torch's module has; empty if it can.

        With ``tied``, torch's factors reach the table and the head, as ours do.
        """
        if not self.module:
            return f"expected the weight of a module, which {self.name!r} does not name"
        if self.layout is None:
            return f"the roles of its axes are not known; {ROLES}"
        if len(self.used_as) > 1 and not (tied and self.is_tied):
            return (
                f"it is used as {' and '.join(sorted(self.used_as))}: torch's {self.module!r} is "
                "only one of these, and adapting it leaves the other as it is; give the function "
                "two parameters"
            )
        if self.kind == "embedding" and len(self.layout.in_axes) > 1:
            return f"expected an embedding to have one axis of rows, got {self._ins}"
        return ""

    def problem_of_value(self, *, tied: bool = True) -> str:
        """Why its value cannot be turned into torch's or from it; empty if it can.

        Without ``tied``, torch's value is that of one of the modules that are one parameter here.
        """
        if len(self.used_as) > 1 and not tied:
            return self.problem_of_factors()
        matrix = len(self.part_shape) > 1 and (self.is_weight or self.layout is not None)
        if matrix and self.layout is None:
            return f"the roles of its axes are not known, which {self.name!r} needs; {ROLES}"
        return UNSURE if matrix and not self.sure else ""

    @property
    def _ins(self) -> tuple[int, ...]:
        """The sizes of the in-axes, in our order."""
        return tuple(self.matrix.shape[i] for i in self.matrix.in_axes)

    @property
    def torch_ins(self) -> tuple[int, ...]:
        """The sizes of the in-axes as torch has them; one size if it has only one axis."""
        ordered = tuple(self._ins[i] for i in self.order)
        return ordered if self.kind == "conv" else (math.prod(ordered),)

    def a_shape(self, rank: int) -> tuple[int, ...]:
        """The shape of torch's A."""
        return (rank, *self.torch_ins)

    def b_shape(self, rank: int) -> tuple[int, ...]:
        """The shape of torch's B."""
        return (self.fan_out, rank, *(1,) * (len(self.torch_ins) - 1))

    def magnitude_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes that DoRA's magnitudes have: the one that PEFT writes, and a plain vector."""
        plain: tuple[int, ...] = (self.fan_out,)
        ones = (1,) * (len(self.torch_ins) - 1)
        return ((1, self.fan_out, *ones), plain) if self.kind == "conv" else (plain,)

    def a_from_torch(self, a: np.ndarray) -> np.ndarray:
        """``[in, rank]`` of torch's A, in any shape that begins with the rank."""
        rank = a.shape[0]
        a = a.reshape(rank, *[self._ins[i] for i in self.order])
        a = a.transpose(*[1 + self.order.index(i) for i in range(len(self.order))], 0)
        return a.reshape(-1, rank)

    def a_to_torch(self, a: np.ndarray) -> np.ndarray:
        """Torch's A of ``[in, rank]``."""
        rank = a.shape[-1]
        a = a.reshape(*self._ins, rank).transpose(len(self.order), *self.order)
        return a.reshape(self.a_shape(rank))

    def b_from_torch(self, b: np.ndarray) -> np.ndarray:
        """``[rank, out]`` of torch's B, in any shape that begins with the outputs."""
        return b.reshape(self.fan_out, -1).T

    def b_to_torch(self, b: np.ndarray) -> np.ndarray:
        """Torch's B of ``[rank, out]``."""
        return b.T.reshape(self.b_shape(b.shape[0]))

    @functools.cached_property
    def _axes(self) -> tuple[int, ...]:
        """Our axes, without those of the stack, in torch's order."""
        layout = self.layout
        rest = self.rest
        if layout is None:
            return tuple(range(len(rest)))
        ins = [layout.in_axes[i] for i in self.order]
        outs = list(layout.out_axes)
        first = (*ins, *outs) if self._rows_are_inputs else (*outs, *ins)
        return tuple(rest.index(i) for i in first)

    @property
    def _rows_are_inputs(self) -> bool:
        return self.kind in ("conv1d", "embedding")

    @property
    def _whole_shape(self) -> tuple[int, ...]:
        """The shape that torch's parameter would have with all of our outputs."""
        shape = tuple(self.part_shape[i] for i in self._axes)
        layout = self.layout
        if layout is None:
            return (math.prod(shape),) if self.flat or self.columns else shape
        if self.kind == "conv":
            return shape
        flat = (layout.fan_in, layout.fan_out)
        return flat if self._rows_are_inputs else flat[::-1]

    @property
    def _mine(self) -> tuple[slice, ...]:
        """Its part of torch's parameter with all of our outputs."""
        return (slice(None), self.outs) if self._rows_are_inputs else (self.outs,)

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Its shape in torch."""
        if not self.columns:
            return self._whole_shape
        begin, end = self.columns
        shape = list(self._whole_shape)
        shape[len(self._mine) - 1] = end - begin
        return tuple(shape)

    def read(self, array: Any) -> np.ndarray:
        """Torch's value, of our whole parameter."""
        part = np.asarray(array)[self.where]
        whole = part.transpose(self._axes).reshape(self._whole_shape)
        return whole[self._mine] if self.columns else whole

    def write(self, array: np.ndarray, value: np.ndarray) -> None:
        """Put torch's value into our whole parameter, an array that may be written to."""
        part = array[self.where]
        moved = part.transpose(self._axes)
        if self.columns:
            whole = moved.reshape(self._whole_shape).copy()
            whole[self._mine] = value
            value = whole
        moved[...] = value.reshape(moved.shape)


def places_of(
    params: Any,
    names: Iterable[Name | tuple[str, str]],
    layouts: Mapping[str, Any] | None = None,
) -> dict[str, Place]:
    """All parameters that the rules name, by their name in torch.

    Args:
        params: The parameters, or their shapes.
        names: The rules; a pair is a rule that sets nothing else.
        layouts: The roles of the axes by path: what `jax_lora.discover` returns, ``plan.targets``,
            an adapter, or `Layout`. What is missing there is taken from the rules' ``axes``.

    Raises:
        ConfigError: Rules that do not fit the parameters, or give two of them one name.
    """
    rules = Rules(names)
    places: dict[str, Place] = {}
    problems: list[str] = []
    for path, leaf in leaves_by_path(params).items():
        decided = rules.of(path)
        if decided is None:
            continue
        rule, values = decided
        shape = tuple(np.shape(leaf)) if not hasattr(leaf, "shape") else tuple(leaf.shape)
        found = _places_of_one(path, shape, rule, values, (layouts or {}).get(path))
        if isinstance(found, str):
            problems.append(f"{path}: {found}")
            continue
        for place in found:
            if place.name in places:
                other = places[place.name].path
                problems.append(f"{path}: is called {place.name!r}, and so is {other}")
            else:
                places[place.name] = place
    if problems:
        raise ConfigError("the names do not fit the parameters:\n  " + "\n  ".join(problems))
    if not places:
        raise ConfigError(
            "expected names for some of the parameters, no rule matches any; the paths are such as "
            + ", ".join(list(leaves_by_path(params))[:3])
        )
    return {name: _as_bias(place, places) for name, place in places.items()}


def _places_of_one(
    path: str, shape: tuple[int, ...], rule: Name, values: Mapping[str, str], known: Any
) -> list[Place] | str:
    """What a rule makes of a parameter that it matches, or what is wrong with it."""
    used, kinds = _role(known, shape)
    kind = rule.kind or (kinds[0] if kinds else "linear")
    told = _told(rule, shape)
    if isinstance(told, str):
        return told
    if rule.axes and used is not None and used != told:
        return f"expected axes={rule.axes!r} to fit the roles of its axes, {used}"
    layout = used or told
    stack_axes = layout.stack_axes if layout else tuple(range(len(rule.counted)))
    if len(stack_axes) != len(rule.counted) or len(shape) < len(stack_axes):
        what = f"stack-axes {layout.stack_axes}" if layout else f"shape {shape}"
        return (
            f"expected a field of {rule.name!r} for each stack-axis that the path does not have, "
            f"it counts {rule.counted}, and the parameter has {what}"
        )
    for field, axis in zip(rule.counted, stack_axes, strict=True):
        if field in rule.parts and len(rule.parts[field]) != shape[axis]:
            return f"expected {shape[axis]} words for {field!r}, got {list(rule.parts[field])}"
    order = _order(rule, layout, kind)
    if isinstance(order, str):
        return order
    plain = Place(
        name="",
        path=path,
        index=(),
        shape=shape,
        kind=kind,
        layout=layout,
        order=order,
        stacked=len(stack_axes),
        used_as=frozenset(kinds),
        sure=rule.kind is not None or bool(kinds),
    )
    split = _split(rule, plain)
    if isinstance(split, str):
        return split
    places = []
    for index in itertools.product(*(range(shape[i]) for i in stack_axes)):
        counted = {x: rule.word(x, k) for x, k in zip(rule.counted, index, strict=True)}
        for word, columns in split:
            name = rule.fill({**values, **counted, **word})
            places.append(dataclasses.replace(plain, name=name, index=index, columns=columns))
    return places


def _role(known: Any, shape: tuple[int, ...]) -> tuple[Layout | None, list[Kind]]:
    """The layout that what is known of a parameter gives it, and what kinds it is used as."""
    if isinstance(known, Layout):
        return known, []
    uses: Sequence[Use] = known if isinstance(known, tuple) else getattr(known, "uses", ())
    layout = None if isinstance(known, tuple) else getattr(known, "layout", None)
    kinds: list[Kind] = []
    for use in uses:
        found = use.layout(shape)
        if found is not None:
            layout = layout or found
            kinds.append(_KIND_OF_USE[MATRIX_USES[use.primitive]])
    return layout, kinds


def _told(rule: Name, shape: tuple[int, ...]) -> Layout | str | None:
    """The layout that a rule gives, or what is wrong with it; None if it gives none."""
    counted = len(rule.counted)
    axes = rule.axes
    if not axes and rule.kind == "embedding" and len(shape) == counted + 2:
        axes = "io"  # a table has its rows first
    if not axes:
        return None
    axes = axes if "s" in axes else "s" * counted + axes
    if len(axes) != len(shape):
        return f"expected axes={rule.axes!r} to have a letter for each axis of shape {shape}"
    role = {x: tuple(i for i, letter in enumerate(axes) if letter == x) for x in "so"}
    ins = tuple(i for i, letter in enumerate(axes) if letter not in "so")
    return Layout(shape, in_axes=ins, out_axes=role["o"], stack_axes=role["s"])


def _order(rule: Name, layout: Layout | None, kind: Kind) -> tuple[int, ...] | str:
    """Where each of torch's in-axes is among the layout's, or what is wrong."""
    if layout is None:
        return ()
    ins = tuple(range(len(layout.in_axes)))
    if kind != "conv":
        return ins
    if len(layout.out_axes) != 1 or len(ins) < 2:
        return (
            "expected a convolution to have one out-axis and an in-axis for each of its channels "
            f"and directions, got in={layout.in_axes}, out={layout.out_axes}"
        )
    (out,) = layout.out_axes
    if rule.axes:
        letters = [x for x in rule.axes if x not in "so"]
        channel = letters.index("i")
    else:
        channel = min(ins, key=lambda i: abs(layout.in_axes[i] - out))
        beside = [i for i in ins if abs(layout.in_axes[i] - out) == 1]
        if beside != [channel]:
            return "expected the input channels beside the output channels; say axes= in its rule"
    return (channel, *(i for i in ins if i != channel))


def _split(rule: Name, place: Place) -> list[tuple[dict[str, str], tuple[int, int] | None]] | str:
    """The modules that lie side by side in the outputs, with their columns."""
    if not rule.outputs:
        return [({}, None)]
    ((field, sizes),) = rule.outputs
    outs = place.layout.fan_out if place.layout else math.prod(place.part_shape)
    if sum(sizes.values()) != outs:
        return f"expected sizes for {field!r} that add up to its {outs} outputs, got {dict(sizes)}"
    ends = list(itertools.accumulate(sizes.values()))
    return [
        ({field: word}, (end - sizes[word], end)) for word, end in zip(sizes, ends, strict=True)
    ]


def _as_bias(place: Place, places: Mapping[str, Place]) -> Place:
    """A bias of several axes as torch has it: in one, if it is that of such outputs."""
    weight = places.get(f"{place.module}.weight")
    if not place.is_bias or place.layout or len(place.part_shape) < 2 or weight is None:
        return place
    outs = [weight.shape[i] for i in weight.layout.out_axes] if weight.layout else []
    return dataclasses.replace(place, flat=True) if outs == list(place.part_shape) else place
