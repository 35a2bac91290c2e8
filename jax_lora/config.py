"""What to adapt and how, as frozen data: the only home of these defaults."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jax_lora.errors import ConfigError
from jax_lora.rules import (
    ALL_LINEAR,
    SETTINGS,
    Init,
    Mode,
    Rule,
    Scaling,
    Variant,
    check_fields,
    pattern_problems,
    plain_values,
    value_problems,
)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """How a model is adapted.

    Attributes:
        rank: The rank r of the update, at least 1.
        alpha: The strength of the update; a finite number.
        targets: Which parameters are adapted: a preset such as ``"all-linear"``, every weight that
            the function uses in matrix products and not otherwise as a matrix (in a convolution, or
            as an embedding that is looked up; see `Rule` for the other presets), or one or more
            globs over parameter paths such as ``"**/kernel"``. ``*`` stays within one path
            component, ``**`` crosses components. A `Rule` in the place of a glob also says how, if
            otherwise than below. The first that matches a parameter decides about it.
        exclude: Globs, or regular expressions after ``re:``, of parameters that are not adapted
            although ``targets`` matches them.
        scaling: What multiplies ``a b``: ``"standard"`` alpha/r (Hu et al. 2021,
            arXiv:2106.09685), ``"rslora"`` alpha/sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732),
            or ``"alpha"`` itself.
        init: How ``a`` starts (``b`` starts at zero): ``"kaiming"`` uniform on ±1/sqrt(fan_in),
            ``"gaussian"`` normal with standard deviation 1/r, ``"article"`` uniform on ±1/sqrt(r),
            ``"orthogonal"`` with orthonormal columns. Or both are parts of the weight whose product
            at the start is subtracted: ``"pissa"``, its largest singular values and vectors (Meng
            et al. 2024, arXiv:2404.02948), and ``"olora"``, from its QR decomposition (Büyükakyüz
            2024, arXiv:2406.01775). `init_eva` and `init_lora_ga` start from data.
        dtype: The dtype of what is trained. It is cast where it meets a weight.
        variant: What kind of update it is: ``"lora"``, ``"lora-fa"`` with ``a`` frozen, ``"dora"``
            with magnitudes apart, ``"vera"`` with random factors and trained vectors, ``"loha"``
            and ``"lokr"`` as a Hadamard and a Kronecker product, or ``"full"``, the parameter
            itself. Each is described, with its paper, in `jax_lora.variants`.
        dropout: The probability with which `jax_lora.dropout` drops each input of the update.
        mode: What a product with an adapted weight does, for ``apply(fun, mode=plan.modes)``:
            ``"factored"``, ``"materialize"``, or ``"auto"``; see `jax_lora.apply`.

    Raises:
        ConfigError: A value that cannot mean anything.

    Example:
        >>> LoraConfig(rank=32, alpha=64.0).scale
        2.0
    """

    rank: int = 8
    alpha: float = 8.0
    targets: str | Rule | tuple[str | Rule, ...] = ALL_LINEAR
    exclude: tuple[str, ...] = ()
    scaling: Scaling = "standard"
    init: Init = "kaiming"
    dtype: str = "float32"
    variant: Variant = "lora"
    dropout: float = 0.0
    mode: Mode = "factored"

    def __post_init__(self) -> None:
        values = plain_values({name: getattr(self, name) for name in SETTINGS})
        for name, value in values.items():
            object.__setattr__(self, name, value)
        problems = value_problems(values)
        for name, kinds, what in (
            ("targets", (str, Rule), "globs over parameter paths, or rules"),
            ("exclude", (str,), "globs over parameter paths"),
        ):
            entries = getattr(self, name)
            if isinstance(entries, kinds):
                entries = (entries,)
            known = isinstance(entries, (tuple, list))
            if not known or any(not isinstance(e, kinds) or not e for e in entries):
                problems.append(f"expected {name} to be {what}; got {entries!r}")
                continue
            patterns = (entry for entry in entries if isinstance(entry, str))
            problems += [f"{name}: {p}" for entry in patterns for p in pattern_problems(entry)]
            object.__setattr__(self, name, tuple(entries))
        if self.targets == ():
            problems.append("expected at least one target, got none; 'all-linear' adapts them all")
        if problems:
            raise ConfigError("\n  ".join(problems))

    @property
    def scale(self) -> float:
        """What multiplies ``a b``."""
        divisor = {"standard": self.rank, "rslora": math.sqrt(self.rank), "alpha": 1.0}
        return self.alpha / divisor[self.scaling]

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The targets as rules, a glob as one that sets nothing."""
        assert isinstance(self.targets, tuple)
        return tuple(t if isinstance(t, Rule) else Rule(t) for t in self.targets)

    def to_json(self) -> dict[str, Any]:
        """The configuration as JSON-able data; see `Rule.to_json` for predicates."""
        assert isinstance(self.targets, tuple)
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {
            "targets": [t.to_json() if isinstance(t, Rule) else t for t in self.targets],
            "exclude": list(self.exclude),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LoraConfig:
        """The configuration that `to_json` wrote.

        Raises:
            ConfigError: An unknown field or an impossible value.
        """
        check_fields(cls, data)
        values = dict(data)
        if isinstance(values.get("targets"), (list, tuple)):
            values["targets"] = tuple(
                Rule.from_json(t) if isinstance(t, Mapping) else t for t in values["targets"]
            )
        return cls(**values)
