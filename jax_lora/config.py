"""What to adapt and how, as frozen data: the only home of these defaults."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from jax_lora.errors import ConfigError, near_misses

Scaling = Literal["standard", "rslora", "alpha"]
Init = Literal["kaiming", "gaussian", "article"]

#: The preset that selects every weight that the function uses as a matrix.
ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """How a model is adapted.

    Attributes:
        rank: The rank r of the update, at least 1.
        alpha: The strength of the update; a finite number.
        targets: Which parameters are adapted: ``"all-linear"``, every weight that the function
            uses in matrix products and not otherwise as a matrix (in a convolution, or as an
            embedding that is looked up), or one or more globs over parameter paths such as
            ``"**/kernel"``. ``*`` stays within one path component, ``**`` crosses components.
        exclude: Globs of parameters that are not adapted although ``targets`` matches them.
        scaling: What multiplies ``a b``: ``"standard"`` alpha/r (Hu et al. 2021,
            arXiv:2106.09685), ``"rslora"`` alpha/sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732),
            or ``"alpha"`` itself.
        init: How ``a`` starts (``b`` starts at zero): ``"kaiming"`` uniform on ±1/sqrt(fan_in),
            ``"gaussian"`` normal with standard deviation 1/r, ``"article"`` uniform on ±1/sqrt(r).
        dtype: The dtype of ``a`` and ``b``. They are cast where they meet a weight.

    Raises:
        ConfigError: A value that cannot mean anything.

    Example:
        >>> LoraConfig(rank=32, alpha=64.0).scale
        2.0
    """

    rank: int = 8
    alpha: float = 8.0
    targets: str | tuple[str, ...] = ALL_LINEAR
    exclude: tuple[str, ...] = ()
    scaling: Scaling = "standard"
    init: Init = "kaiming"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"expected a rank of at least 1, got rank={self.rank!r}")
        number = isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool)
        if not number or not math.isfinite(self.alpha):
            raise ConfigError(f"expected alpha to be a finite number, got alpha={self.alpha!r}")
        for name, choices in (("scaling", get_args(Scaling)), ("init", get_args(Init))):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(
                    f"expected {name} to be one of {', '.join(choices)}; got {value!r} "
                    f"({near_misses(str(value), choices)})"
                )
        if self.dtype not in ("float64", "float32", "bfloat16", "float16"):
            raise ConfigError(
                f"expected a floating-point dtype such as float32, got {self.dtype!r}"
            )
        for name in ("targets", "exclude"):
            globs = getattr(self, name)
            if isinstance(globs, str):
                globs = (globs,)
            known = isinstance(globs, (tuple, list))
            if not known or any(not isinstance(g, str) or not g for g in globs):
                raise ConfigError(
                    f"expected {name} to be globs over parameter paths, got {globs!r}"
                )
            object.__setattr__(self, name, tuple(globs))
        if not self.targets:
            raise ConfigError(
                "expected at least one target, got none; 'all-linear' adapts them all"
            )

    @property
    def scale(self) -> float:
        """What multiplies ``a b``."""
        divisor = {"standard": self.rank, "rslora": math.sqrt(self.rank), "alpha": 1.0}
        return self.alpha / divisor[self.scaling]

    def to_json(self) -> dict[str, Any]:
        """The configuration as JSON-able data."""
        return dataclasses.asdict(self) | {
            "targets": list(self.targets),
            "exclude": list(self.exclude),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LoraConfig:
        """The configuration that `to_json` wrote.

        Raises:
            ConfigError: An unknown field or an impossible value.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = [name for name in data if name not in known]
        if unknown:
            raise ConfigError(
                f"expected the fields {', '.join(sorted(known))}; got also {', '.join(unknown)}"
            )
        return cls(**data)


@functools.cache
def _glob_pattern(glob: str) -> re.Pattern[str]:
    """A glob over paths as a regular expression.

    ``**`` matches any number of whole components, also none; ``*`` and ``?`` stay within one.
    """
    pieces = {"**/": "(?:.*/)?", "/**": "(?:/.*)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(^\*\*/|/\*\*$|\*\*/|\*\*|\*|\?)", glob)
    return re.compile("".join(pieces.get(part, re.escape(part)) for part in parts) + r"\Z")


def glob_matches(glob: str, path: str) -> bool:
    """Whether a glob matches a whole path.

    Example:
        >>> glob_matches("**/kernel", "params/l1/kernel"), glob_matches("*/kernel", "a/b/kernel")
        (True, False)
    """
    return _glob_pattern(glob).match(path) is not None
