"""What torch calls each parameter: rules from paths to the names of a ``state_dict``."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from jax_lora.errors import ConfigError
from jax_lora.rules import check_fields

Kind = Literal["linear", "conv1d", "embedding", "conv"]
_FIELD = re.compile(r"\{(\w+)(\*\*)?\}")


def _is_part(part: Any) -> bool:
    if isinstance(part, Mapping):
        sizes = all(type(size) is int and size > 0 for size in part.values())
        return len(part) > 1 and sizes and all(isinstance(word, str) and word for word in part)
    words = isinstance(part, (tuple, list)) and all(isinstance(x, str) and x for x in part)
    return words and 0 < len(set(part)) == len(part)


@dataclasses.dataclass(frozen=True)
class Name:
    """A rule: the parameters at ``path`` are called ``name`` in torch.

    ``{field}`` in the path stands for one component or a part of one, ``{field**}`` for several
    components, whose slashes become dots. In the name, ``{field}`` is what stood there; a field
    that the path does not have counts along a stack-axis of the parameter, such as the layers of a
    scan, unless ``parts`` says otherwise. The first rule that matches a path decides.

    Attributes:
        path: The parameter's path, such as ``"params/layers_{layer}/q/kernel"``.
        name: The parameter's name in torch, such as ``"model.layers.{layer}.q_proj.weight"``.
        kind: What the module is in torch: ``"linear"``, whose weight is ``[out, in]``;
            ``"conv1d"``, the linear layer of GPT-2, with ``[in, out]``; ``"embedding"``; or
            ``"conv"``. None to read it from the parameter's use.
        axes: A letter for each axis of the parameter: ``i`` for inputs and ``o`` for outputs, each
            as often as need be, ``s`` for a stack (without one, stack-axes come first), and for a
            convolution any other letter for a direction in space: ``"io"``, ``"ioo"`` (an input to
            several heads), ``"hwio"``. Needed only where no function says it, and for a convolution
            whose input channels are not beside its outputs.
        parts: For a field that the path does not have. Words, ``{"which": ("gate", "up")}``, are
            the entries of the stack-axis by name. Words with sizes, ``{"p": {"q": 64, "k": 16,
            "v": 16}}``, are modules of torch whose outputs lie side by side in this one parameter.

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
    parts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = self._text_problems()
        if not problems:
            problems += self._field_problems()
        if self.kind is not None and self.kind not in get_args(Kind):
            problems.append(f"expected kind to be one of {get_args(Kind)}, got {self.kind!r}")
        problems += self._axes_problems()
        if problems:
            raise ConfigError(f"in the rule for {self.path!r}:\n  " + "\n  ".join(problems))

    def _text_problems(self) -> list[str]:
        problems = []
        for field in ("path", "name"):
            value = getattr(self, field)
            plain = _FIELD.sub("", value) if isinstance(value, str) else ""
            if not isinstance(value, str) or not value or "{" in plain or "}" in plain:
                problems.append(f"expected {field} to be text with {{fields}}, got {value!r}")
        if not isinstance(self.parts, Mapping) or not all(map(_is_part, self.parts.values())):
            problems.append(
                "expected parts to have, by field, different words or words with sizes, got "
                f"{self.parts!r}"
            )
        return problems

    def _field_problems(self) -> list[str]:
        problems = []
        for field in ("path", "name"):
            found = [name for name, _ in _FIELD.findall(getattr(self, field))]
            if len(set(found)) < len(found):
                problems.append(f"expected each field once in {getattr(self, field)!r}")
        if lost := set(self.bound) - set(self._named):
            problems.append(
                f"expected the name to have the fields of the path, {self.name!r} lacks "
                f"{', '.join(sorted(lost))}: different parameters would get one name"
            )
        if odd := [x for x in self.parts if x in self.bound or x not in self._named]:
            problems.append(
                f"expected parts of fields that the name has and the path does not, got {odd}"
            )
        if len([x for x in self.parts.values() if isinstance(x, Mapping)]) > 1:
            problems.append("expected at most one field of parts to have sizes")
        return problems

    def _axes_problems(self) -> list[str]:
        axes = self.axes if isinstance(self.axes, str) else "?"
        if not axes:
            return []
        if self.kind is None:
            return ["expected axes only together with kind"]
        spatial = [letter for letter in axes if letter not in "ios"]
        once = self.kind != "conv" or (axes.count("i"), axes.count("o")) == (1, 1)
        if not {"i", "o"} <= set(axes) or not once or len(set(spatial)) < len(spatial):
            return [
                "expected axes to have i and o, each once for a convolution, and other letters at "
                f"most once, got {self.axes!r}"
            ]
        if (self.kind == "conv") != bool(spatial):
            what = "a convolution" if spatial else "no convolution"
            return [f"expected kind={self.kind!r} with other axes than {axes!r}, those of {what}"]
        return []

    @property
    def bound(self) -> tuple[str, ...]:
        """The fields of the path."""
        return tuple(name for name, _ in _FIELD.findall(self.path))

    @property
    def _named(self) -> tuple[str, ...]:
        return tuple(name for name, _ in _FIELD.findall(self.name))

    @property
    def counted(self) -> tuple[str, ...]:
        """The fields that count along the stack-axes."""
        split = {field for field, _ in self.outputs}
        return tuple(x for x in self._named if x not in self.bound and x not in split)

    @property
    def outputs(self) -> tuple[tuple[str, Mapping[str, int]], ...]:
        """The field that stands for modules side by side, if there is one, with their sizes."""
        return tuple((x, part) for x, part in self.parts.items() if isinstance(part, Mapping))

    def word(self, field: str, index: int) -> str:
        """What a field that counts is for an entry of the stack."""
        return str(self.parts[field][index]) if field in self.parts else str(index)

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        pattern, at = "", 0
        for field in _FIELD.finditer(self.path):
            some = ".+" if field[2] else "[^/]+"
            pattern += re.escape(self.path[at : field.start()]) + f"(?P<{field[1]}>{some})"
            at = field.end()
        return re.compile(pattern + re.escape(self.path[at:]))

    def match(self, path: str) -> dict[str, str] | None:
        """The fields' values in a path; None if it does not match."""
        found = self._pattern.fullmatch(path)
        if found is None:
            return None
        return {field: value.replace("/", ".") for field, value in found.groupdict().items()}

    def fill(self, values: Mapping[str, str]) -> str:
        """The name with its fields filled in."""
        return _FIELD.sub(lambda field: values[field[1]], self.name)

    def to_json(self) -> dict[str, Any]:
        """The rule as JSON-able data, without what is not set."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {field: value for field, value in found.items() if value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Name:
        """The rule that `to_json` wrote, or a person.

        Raises:
            ConfigError: An unknown field, a missing one, or an impossible value.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"expected a rule to be path, name, ..., got {data!r}")
        check_fields(cls, data)
        if lost := {"path", "name"} - set(data):
            raise ConfigError(
                f"expected a rule with {' and '.join(sorted(lost))}, got {dict(data)}"
            )
        return cls(**data)


class Rules:
    """Rules by the paths that they decide about: the first that matches one.

    A rule for a single path is found without asking the others, of which there may be thousands.
    """

    def __init__(self, rules: Iterable[Name | tuple[str, str]]):
        self._rules = [rule if isinstance(rule, Name) else Name(*rule) for rule in rules]
        self._single: dict[str, int] = {}
        self._others: list[int] = []
        for k, rule in enumerate(self._rules):
            if rule.bound:
                self._others.append(k)
            else:
                self._single.setdefault(rule.path, k)

    def of(self, path: str) -> tuple[Name, dict[str, str]] | None:
        """The rule that decides about a path, and its fields' values; None if there is none."""
        single = self._single.get(path, len(self._rules))
        for k in self._others:
            if k > single:
                break
            values = self._rules[k].match(path)
            if values is not None:
                return self._rules[k], values
        return (self._rules[single], {}) if single < len(self._rules) else None

    def used_for(self, paths: Iterable[str]) -> list[Name]:
        """The rules that decide about some paths, in their order."""
        used = {id(found[0]) for path in paths if (found := self.of(path))}
        return [rule for rule in self._rules if id(rule) in used]


def flax_names(*, numbered: Iterable[str] = (), stacked: Iterable[str] = ()) -> tuple[Name, ...]:
    """The names of a tree that keeps torch's structure, with the leaves' names of Flax or torch.

    ``kernel``, ``embedding`` and ``scale`` are torch's ``weight``; everything else keeps its name.
    The tree may begin with ``params`` or not, and its leaves may be Flax's variables.

    Args:
        numbered: Lists of modules whose number is part of their component, as with Flax's names:
            for ``"layers"`` is ``layers_3/q/kernel`` torch's ``layers.3.q.weight``. Without it
            that would be ``layers_3.q.weight``, and ``layers/3/q/kernel`` is right as it is.
        stacked: Lists of modules that are one, with a leading axis, as in a scan: for ``"layers"``
            is ``layers/q/kernel`` each of torch's ``layers.{number}.q.weight``.

    Returns:
        The rules, `FLAX` if no lists are given. Put your own before them for what is called
        otherwise: the first rule that matches a path decides.

    Example:
        >>> rules = flax_names(numbered=["layers"])
        >>> values = [(rule, rule.match("params/model/layers_3/q/kernel")) for rule in rules]
        >>> next(rule.fill(found) for rule, found in values if found)
        'model.layers.3.q.weight'
    """
    starts = [("{at**}/", "{at}."), ("", "")]
    lists = [(f"{at}{x}_{{n}}/", f"{to}{x}.{{n}}.") for x in numbered for at, to in starts]
    lists += [(f"{at}{x}/", f"{to}{x}.{{n}}.") for x in stacked for at, to in starts]
    leaves: dict[str, Kind | None] = {"kernel": None, "embedding": "embedding", "scale": None}
    rules = []
    for top, end in itertools.product(("params/", ""), ("/value", "")):
        for at, to in (*lists, ("", "")):
            for leaf, kind in leaves.items():
                module = Name(f"{top}{at}{{m**}}/{leaf}{end}", f"{to}{{m}}.weight", kind)
                rules += [module, Name(f"{top}{at}{leaf}{end}", f"{to}weight", kind)]
            rules.append(Name(f"{top}{at}{{m**}}{end}", f"{to}{{m}}"))
    return tuple(rules)


#: The names of trees that keep torch's structure; see `flax_names`.
FLAX = flax_names()
