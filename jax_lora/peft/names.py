"""Which parameter is called what by torch, and how its axes lie there: given by rules.

A rule is a parameter's path and the name that torch's ``state_dict`` has for it. All transposes
between the two worlds are in this file.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from jax_lora.adapter import Layout, leaves_by_path
from jax_lora.discover import MATRIX_USES, Use
from jax_lora.errors import ConfigError

Kind = Literal["linear", "conv1d", "embedding", "conv"]
_KIND_OF_USE: dict[str, Kind] = {
    "linear": "linear",
    "convolution": "conv",
    "embedding": "embedding",
}
_FIELD = re.compile(r"\{(\w+)(\*\*)?\}")


@dataclasses.dataclass(frozen=True)
class Name:
    """A rule: the parameters at ``path`` are called ``name`` in torch.

    ``{field}`` in the path stands for one component or a part of one, ``{field**}`` for several
    components, whose slashes become dots. In the name, ``{field}`` is what stood there; a field
    that the path does not have counts along a stack-axis of the parameter, such as the layers of a
    scan. The first rule that matches a path decides.

    Attributes:
        path: The parameter's path, such as ``"params/layers_{layer}/q/kernel"``.
        name: The parameter's name in torch, such as ``"model.layers.{layer}.q_proj.weight"``.
        kind: What the module is in torch: ``"linear"``, whose weight is ``[out, in]``;
            ``"conv1d"``, the linear layer of GPT-2, with ``[in, out]``; ``"embedding"``; or
            ``"conv"``. None to read it from the parameter's use.
        axes: For a convolution, a letter for each axis of the parameter but its stack-axes: ``i``
            and ``o`` for channels, any other for space, such as ``"hwio"``. Without it the input
            channels are taken to be beside the output channels, as they are in ``"hwio"`` and
            ``"oihw"``.

    Raises:
        ConfigError: A field that cannot mean anything.

    Example:
        >>> rule = Name("layers_{layer}/q/kernel", "model.layers.{layer}.q_proj.weight")
        >>> rule.match("layers_3/q/kernel")
        {'layer': '3'}
        >>> stacked = Name("layers/q/kernel", "model.layers.{layer}.q_proj.weight")
        >>> stacked.counted
        ('layer',)
    """

    path: str
    name: str
    kind: Kind | None = None
    axes: str = ""

    def __post_init__(self) -> None:
        problems = []
        for field in ("path", "name"):
            value = getattr(self, field)
            plain = _FIELD.sub("", value) if isinstance(value, str) else ""
            if not isinstance(value, str) or not value or "{" in plain or "}" in plain:
                problems.append(f"expected {field} to be text with {{fields}}, got {value!r}")
        if not problems:
            for field in ("path", "name"):
                found = [name for name, _ in _FIELD.findall(getattr(self, field))]
                if len(set(found)) < len(found):
                    problems.append(f"expected each field once in {getattr(self, field)!r}")
            if lost := set(self._bound) - set(self._named):
                problems.append(
                    f"expected the name to have the fields of the path, {self.name!r} lacks "
                    f"{', '.join(sorted(lost))}: different parameters would get one name"
                )
        if self.kind is not None and self.kind not in get_args(Kind):
            problems.append(f"expected kind to be one of {get_args(Kind)}, got {self.kind!r}")
        letters = self.axes if isinstance(self.axes, str) else "?"
        if letters and (len(set(letters)) < len(letters) or not {"i", "o"} <= set(letters)):
            problems.append(
                f"expected axes to be different letters, i and o among them, got {self.axes!r}"
            )
        if letters and self.kind != "conv":
            problems.append("expected axes only with kind='conv'")
        if problems:
            raise ConfigError(f"in the rule for {self.path!r}:\n  " + "\n  ".join(problems))

    @property
    def _bound(self) -> tuple[str, ...]:
        return tuple(name for name, _ in _FIELD.findall(self.path))

    @property
    def _named(self) -> tuple[str, ...]:
        return tuple(name for name, _ in _FIELD.findall(self.name))

    @property
    def counted(self) -> tuple[str, ...]:
        """The fields that count along the stack-axes."""
        return tuple(name for name in self._named if name not in self._bound)

    def match(self, path: str) -> dict[str, str] | None:
        """The fields' values in a path; None if it does not match."""
        pattern, at = "", 0
        for field in _FIELD.finditer(self.path):
            some = ".+" if field[2] else "[^/]+"
            pattern += re.escape(self.path[at : field.start()]) + f"(?P<{field[1]}>{some})"
            at = field.end()
        found = re.fullmatch(pattern + re.escape(self.path[at:]), path)
        if found is None:
            return None
        return {field: value.replace("/", ".") for field, value in found.groupdict().items()}

    def fill(self, values: Mapping[str, str]) -> str:
        """The name with its fields filled in."""
        return _FIELD.sub(lambda field: values[field[1]], self.name)


#: The names that Hugging Face's Flax models have, and models that keep torch's structure.
FLAX = (
    Name("params/{module**}/kernel", "{module}.weight"),
    Name("params/{module**}/embedding", "{module}.weight", kind="embedding"),
    Name("params/{module**}/scale", "{module}.weight"),
    Name("params/{module**}/bias", "{module}.bias"),
    Name("params/{parameter**}", "{parameter}"),
)


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

    @property
    def module(self) -> str:
        """The module it belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def is_weight(self) -> bool:
        """Whether it is what LoRA adapts of its module."""
        return self.name.endswith(".weight")

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
    def ins(self) -> tuple[int, ...]:
        """The sizes of the in-axes, in our order."""
        return tuple(self.matrix.shape[i] for i in self.matrix.in_axes)

    @property
    def outs(self) -> tuple[int, ...]:
        """The sizes of the out-axes."""
        return tuple(self.matrix.shape[i] for i in self.matrix.out_axes)

    def problem_of_factors(self) -> str:
        """Why it cannot have factors that torch's module has; empty if it can."""
        if self.layout is None:
            return "the roles of its axes are not in layouts"
        if len(self.used_as) > 1:
            return (
                f"it is used as {' and '.join(sorted(self.used_as))}: torch's {self.module!r} is "
                "only one of these, and adapting it leaves the other as it is; give the function "
                "two parameters"
            )
        if self.kind == "embedding" and len(self.ins) > 1:
            return f"expected an embedding to have one axis of rows, got {self.ins}"
        return ""

    def a_shape(self, rank: int) -> tuple[int, ...]:
        """The shape of torch's A."""
        ordered = tuple(self.ins[i] for i in self.order)
        return (rank, *ordered) if self.kind == "conv" else (rank, math.prod(ordered))

    def b_shape(self, rank: int) -> tuple[int, ...]:
        """The shape of torch's B."""
        ones = (1,) * (len(self.order) - 1) if self.kind == "conv" else ()
        return (self.matrix.fan_out, rank, *ones)

    def magnitude_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes that DoRA's magnitudes have: the one that PEFT writes, and a plain vector."""
        out = self.matrix.fan_out
        plain: tuple[int, ...] = (out,)
        ones = (1,) * (len(self.order) - 1)
        return ((1, out, *ones), plain) if self.kind == "conv" else (plain,)

    def a_from_torch(self, a: np.ndarray) -> np.ndarray:
        """``[*in, rank]`` of torch's A."""
        a = a.reshape(a.shape[0], *[self.ins[i] for i in self.order])
        return a.transpose(*[1 + self.order.index(i) for i in range(len(self.order))], 0)

    def a_to_torch(self, a: np.ndarray) -> np.ndarray:
        """Torch's A of ``[in, rank]`` or ``[*in, rank]``."""
        rank = a.shape[-1]
        a = a.reshape(*self.ins, rank).transpose(len(self.order), *self.order)
        return a.reshape(self.a_shape(rank))

    def b_from_torch(self, b: np.ndarray) -> np.ndarray:
        """``[rank, *out]`` of torch's B."""
        return b.reshape(self.matrix.fan_out, -1).T.reshape(-1, *self.outs)

    def b_to_torch(self, b: np.ndarray) -> np.ndarray:
        """Torch's B of ``[rank, out]`` or ``[rank, *out]``."""
        return b.reshape(b.shape[0], -1).T.reshape(self.b_shape(b.shape[0]))

    @property
    def _axes(self) -> tuple[int, ...]:
        """Our axes, without those of the stack, in torch's order."""
        layout = self.layout
        rest = self.rest
        if layout is None:
            return tuple(range(len(rest)))
        ins = [layout.in_axes[i] for i in self.order]
        outs = list(layout.out_axes)
        first = (*ins, *outs) if self.kind in ("conv1d", "embedding") else (*outs, *ins)
        return tuple(rest.index(i) for i in first)

    @property
    def rest(self) -> tuple[int, ...]:
        """Our axes without those of the stack."""
        return tuple(i for i in range(len(self.shape)) if i not in self.stack_axes)

    @property
    def where(self) -> tuple[Any, ...]:
        """The index of its part of our parameter."""
        at = dict(zip(self.stack_axes, self.index, strict=True))
        return tuple(at.get(i, slice(None)) for i in range(len(self.shape)))

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of its part of our parameter."""
        return tuple(self.shape[i] for i in self.rest)

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Its shape in torch."""
        shape = [self.part_shape[i] for i in self._axes]
        layout = self.layout
        if layout is None or self.kind == "conv":
            return tuple(shape)
        flat = (layout.fan_in, layout.fan_out)
        return flat if self.kind in ("conv1d", "embedding") else flat[::-1]

    def from_torch(self, value: np.ndarray) -> np.ndarray:
        """Our part of torch's value."""
        axes = self._axes
        value = value.reshape([self.part_shape[i] for i in axes])
        return value.transpose([axes.index(i) for i in range(len(axes))])

    def to_torch(self, part: np.ndarray) -> np.ndarray:
        """Torch's value of our part."""
        return part.transpose(self._axes).reshape(self.torch_shape)


def places_of(
    params: Any,
    names: Iterable[Name | tuple[str, str]],
    layouts: Mapping[str, Any],
) -> dict[str, Place]:
    """All parameters that the rules name, by their name in torch.

    Args:
        params: The parameters, or their shapes.
        names: The rules; a pair is a rule that sets nothing else.
        layouts: The roles of the axes by path: what `jax_lora.discover` returns, ``plan.targets``,
            an adapter, or `Layout`.

    Raises:
        ConfigError: Rules that do not fit the parameters, or give two of them one name.
    """
    rules = [rule if isinstance(rule, Name) else Name(*rule) for rule in names]
    places: dict[str, Place] = {}
    problems: list[str] = []
    for path, leaf in leaves_by_path(params).items():
        matches = ((rule, rule.match(path)) for rule in rules)
        rule, values = next(((r, v) for r, v in matches if v is not None), (None, None))
        if rule is None or values is None:
            continue
        shape = tuple(np.shape(leaf)) if not hasattr(leaf, "shape") else tuple(leaf.shape)
        layout, kinds = _role(layouts.get(path), shape)
        kind = rule.kind or (kinds[0] if kinds else "linear")
        stack_axes = layout.stack_axes if layout else tuple(range(len(rule.counted)))
        if len(stack_axes) != len(rule.counted) or len(shape) < len(stack_axes):
            what = f"stack-axes {layout.stack_axes}" if layout else f"shape {shape}"
            problems.append(
                f"{path}: expected a field of {rule.name!r} for each stack-axis that the path does "
                f"not have, it counts {rule.counted}, and the parameter has {what}"
            )
            continue
        order = _order(rule, layout, kind)
        if isinstance(order, str):
            problems.append(f"{path}: {order}")
            continue
        for index in itertools.product(*(range(shape[i]) for i in stack_axes)):
            counted = dict(zip(rule.counted, map(str, index), strict=True))
            name = rule.fill(values | counted)
            if name in places:
                problems.append(f"{path}: is called {name!r}, and so is {places[name].path}")
                continue
            places[name] = Place(
                name,
                path,
                index,
                shape,
                kind,
                layout,
                order,
                len(stack_axes),
                used_as=frozenset(kinds),
                sure=rule.kind is not None or bool(kinds),
            )
    if problems:
        raise ConfigError("the names do not fit the parameters:\n  " + "\n  ".join(problems))
    if not places:
        raise ConfigError(
            "expected names for some of the parameters, no rule matches any; the paths are such as "
            + ", ".join(list(leaves_by_path(params))[:3])
        )
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
        axes = [i for i in range(len(layout.shape)) if i not in layout.stack_axes]
        if len(axes) != len(rule.axes) or axes[rule.axes.index("o")] != out:
            return (
                f"expected axes={rule.axes!r} to fit shape {layout.shape}, with 'o' at axis {out}"
            )
        channel = layout.in_axes.index(axes[rule.axes.index("i")])
    else:
        channel = min(ins, key=lambda i: abs(layout.in_axes[i] - out))
        beside = [i for i in ins if abs(layout.in_axes[i] - out) == 1]
        if beside != [channel]:
            return "expected the input channels beside the output channels; say axes= in its rule"
    return (channel, *(i for i in ins if i != channel))
