"""``adapter_config.json``: read whole or refused, and which modules it means."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jax_lora.errors import CheckpointError

#: Fields that say nothing about what an adapter computes.
_IDLE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "peft_version",
        "lora_dropout",
        "fan_in_fan_out",
        "runtime_config",
        # These go with a field that is refused if it is set, or with a way of starting.
        "megatron_core",
        "qalora_group_size",
        "eva_config",
        "corda_config",
        "lora_ga_config",
    }
)
#: Ways of starting that leave the base as it is.
_PLAIN_STARTS = ("default", "gaussian", "eva", "orthogonal", "mica")
#: Ways of starting that subtract the factors at the start from the base.
_SUBTRACTED = ("pissa", "olora", "corda", "lora_ga")
_MAX_PATTERN, _MAX_QUANTIFIERS = 2000, 5


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What an ``adapter_config.json`` says about the adapter's mathematics.

    Attributes:
        rank: The rank of modules that no pattern matches.
        alpha: Their alpha.
        rank_pattern: Ranks by regular expression; the first that matches decides.
        alpha_pattern: Alphas likewise.
        rslora: Whether the scale is alpha/sqrt(r), and not alpha/r.
        dora: Whether all modules are DoRA.
        targets: The adapted modules: ends of their names, or one regular expression.
        exclude: Modules that are not, likewise.
        layers: The layers that are, or None for all.
        layers_pattern: What comes before a layer's number.
        saved: Ends of the names of modules that are trained whole.
        start: How the factors started, if the base was changed for it; else empty.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] | str
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    start: str = ""

    @classmethod
    def from_json(cls, where: str, data: Mapping[str, Any]) -> PeftConfig:
        """Read a configuration.

        Args:
            where: The file, for errors.
            data: What it holds.

        Raises:
            CheckpointError: Names every field that is missing, has a value that it cannot have, or
                is set and not implemented.
        """
        fields = _Fields(dict(data))
        kind = fields.take("peft_type", lambda x: isinstance(x, str), "text", "")
        if kind != "LORA":
            fields.problems.append(f"peft_type: expected 'LORA', found {kind!r}")
        bias = fields.take("bias", lambda x: isinstance(x, str), "text", "none")
        if bias != "none":
            fields.problems.append(
                f"bias: expected 'none', found {bias!r}: biases that are trained beside the "
                "factors are not implemented"
            )
        layers = fields.take("layers_to_transform", _is_layers, "a number or numbers", None)
        layers = (layers,) if isinstance(layers, int) else layers
        rank_is = "a positive integer"
        found = cls(
            rank=fields.take("r", _is_rank, rank_is),
            alpha=fields.take("lora_alpha", _is_number, "a number"),
            rank_pattern=fields.patterns("rank_pattern", _is_rank, rank_is),
            alpha_pattern=fields.patterns("alpha_pattern", _is_number, "a number"),
            rslora=fields.take("use_rslora", _is_bool, "true or false", False),
            dora=fields.take("use_dora", _is_bool, "true or false", False),
            targets=fields.names("target_modules", required=True),
            exclude=fields.names("exclude_modules"),
            layers=tuple(layers) if layers else None,
            layers_pattern=_as_tuple(fields.names("layers_pattern")),
            saved=_as_tuple(fields.names("modules_to_save")),
            start=fields.start(),
        )
        for field in ("layers_pattern", "modules_to_save"):
            # Both are names that PEFT puts into a regular expression as they are.
            for pattern in _as_tuple(getattr(found, "saved" if "save" in field else field)):
                fields.check_pattern(field, pattern)
        if found.targets == "all-linear":
            fields.problems.append(
                "target_modules: expected the modules' names, found 'all-linear', for which PEFT "
                "writes them when it saves"
            )
        for name, value in fields.data.items():
            if name not in _IDLE and value not in (None, False, "", [], {}):
                shown = repr(value)
                shown = shown if len(shown) < 60 else f"{shown[:57]}..."
                fields.problems.append(
                    f"{name}: is set to {shown}, which is not implemented here, and ignoring it "
                    "would give another model"
                )
        if fields.problems:
            raise CheckpointError(
                f"{where}: not an adapter that can be read:\n  " + "\n  ".join(fields.problems)
            )
        return found

    @functools.cached_property
    def _ranks(self) -> list[tuple[re.Pattern[str], int]]:
        return _compiled(self.rank_pattern)

    @functools.cached_property
    def _alphas(self) -> list[tuple[re.Pattern[str], float]]:
        return _compiled(self.alpha_pattern)

    def rank_of(self, module: str) -> int:
        """The rank of a module."""
        return _first(self._ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What multiplies a module's update."""
        rank, alpha = self.rank_of(module), _first(self._alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def is_saved(self, module: str) -> bool:
        """Whether a module, or one that it is in, is trained whole."""
        parts = module.split(".")
        within = (".".join(parts[: k + 1]) for k in range(len(parts)))
        return any(name.endswith(end) for name in within for end in self.saved)

    def is_target(self, module: str) -> bool:
        """Whether a module is adapted: PEFT's own rule, in its order."""
        if isinstance(self.exclude, str):
            if re.fullmatch(self.exclude, module):
                return False
        elif _ends_with(module, self.exclude):
            return False
        if any(re.match(rf"(^|.*\.){end}($|\..*)", module) for end in self.saved):
            return False
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, module) is not None
        if module in self.targets:
            return True
        if not _ends_with(module, self.targets):
            return False
        if self.layers is None:
            return True
        # The first numbered component is the layer: a later one may be an expert.
        before = self.layers_pattern or (r"[^.]*",)
        start = r"(?:^|.*?\.)" if self.layers_pattern else r".*?\."
        matches = (re.match(rf"{start}{pattern}\.(\d+)\.", module) for pattern in before)
        layer = next((int(match[1]) for match in matches if match), None)
        return layer in self.layers


def adapter_config(
    *,
    rank: int,
    alpha: float,
    targets: tuple[str, ...] | str,
    saved: Iterable[str],
    dora: bool,
    rank_pattern: Mapping[str, int],
    alpha_pattern: Mapping[str, float],
    base_model: str | None,
    task_type: str | None,
    fan_in_fan_out: bool,
    dropout: float,
) -> dict[str, Any]:
    """The smallest configuration that PEFT reads, with everything it needs."""
    return {
        "alpha_pattern": dict(alpha_pattern),
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "modules_to_save": list(saved) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": dict(rank_pattern),
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "task_type": task_type,
        "use_dora": dora,
        "use_rslora": False,
    }


class _Fields:
    """The fields that are not taken yet, and what is wrong with those that are."""

    def __init__(self, data: dict[str, Any]):
        self.data = data
        self.problems: list[str] = []

    def take(self, name: str, right: Any, what: str, *default: Any) -> Any:
        value = self.data.pop(name, None)
        if value is None and default:
            return default[0]
        if not right(value):
            shown = repr(value)
            shown = shown if len(shown) < 60 else f"{shown[:57]}..."
            self.problems.append(f"{name}: expected {what}, found {shown}")
            return default[0] if default else 1
        return value

    def names(self, name: str, *, required: bool = False) -> Any:
        value = self.take(name, _is_names, "names of modules, or a regular expression", ())
        if required and not value:
            self.problems.append(f"{name}: expected names of modules, found none")
        if isinstance(value, str):
            self.check_pattern(name, value)
            return value
        return tuple(value)

    def patterns(self, name: str, right: Any, what: str) -> dict[str, Any]:
        value = self.take(name, lambda x: isinstance(x, dict), "an object", {})
        for pattern, x in value.items():
            self.check_pattern(name, pattern)
            if not right(x):
                self.problems.append(f"{name}: expected {what} for {pattern!r}, found {x!r}")
        return value

    def start(self) -> str:
        value = self.data.pop("init_lora_weights", True)
        if value is None or isinstance(value, bool):
            return ""
        known = str(value).lower()
        if isinstance(value, str) and known in _PLAIN_STARTS:
            return ""
        if isinstance(value, str) and known.split("_niter_")[0] in _SUBTRACTED:
            return value
        self.problems.append(
            f"init_lora_weights: {value!r} is not a start that leaves the base as it is"
        )
        return ""

    def check_pattern(self, name: str, pattern: str) -> None:
        if problem := pattern_problem(pattern):
            shown = pattern if len(pattern) < 80 else f"{pattern[:77]}..."
            self.problems.append(f"{name}: {shown!r}: {problem}")


def pattern_problem(pattern: str) -> str:
    r"""Why a regular expression from a file is not run; empty if it is.

    Python's engine takes exponential time for a repeated group that has a repetition or a choice
    in it, so these are refused, as are long ones and those with many repetitions.

    Example:
        >>> pattern_problem(r".*layers\.(0|1)\..*_proj"), bool(pattern_problem(r"(a+)+b"))
        ('', True)
    """
    limit = _MAX_PATTERN if re.search(r"[*+?{]", pattern) else 100 * _MAX_PATTERN
    if len(pattern) > limit:
        return f"a regular expression of more than {limit:,} characters"
    try:
        for whole in (pattern, rf"(.*\.)?({pattern})$", rf"(?:^|.*?\.){pattern}\.(\d+)\."):
            re.compile(whole)
    except (re.error, OverflowError, RecursionError) as error:
        return f"no regular expression ({error})"
    plain = re.sub(r"\\.", "x", pattern, flags=re.S)
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "x", plain)
    repeated = re.findall(r"[*+]|\{", plain)
    if len(repeated) > _MAX_QUANTIFIERS:
        return f"a regular expression with more than {_MAX_QUANTIFIERS} repetitions"
    opened: list[bool] = []
    for k, letter in enumerate(plain):
        if letter == "(":
            opened.append(False)
        elif letter == ")" and opened:
            inside = opened.pop()
            if inside and plain[k + 1 : k + 2] in ("*", "+", "{"):
                return "a regular expression that repeats a repetition, which can take for ever"
            if opened:
                opened[-1] = opened[-1] or inside
        elif letter in "*+?{|" and opened and plain[k - 1 : k] != "(":
            opened[-1] = True
    return ""


def _compiled(patterns: Mapping[str, Any]) -> list[tuple[re.Pattern[str], Any]]:
    # Once: Python keeps a few hundred itself, and a model may have more.
    return [(re.compile(rf"(.*\.)?({key})$"), x) for key, x in patterns.items()]


def _first(patterns: Iterable[tuple[re.Pattern[str], Any]], module: str, default: Any) -> Any:
    return next((x for pattern, x in patterns if pattern.match(module)), default)


def _ends_with(module: str, ends: Iterable[str]) -> bool:
    return any(module == end or module.endswith(f".{end}") for end in ends)


def _as_tuple(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) and value else tuple(value)


def _is_bool(x: Any) -> bool:
    return isinstance(x, bool)


def _is_rank(x: Any) -> bool:
    return type(x) is int and 0 < x < 2**31


def _is_number(x: Any) -> bool:
    return type(x) in (int, float) and abs(x) < 1e30


def _is_names(x: Any) -> bool:
    return isinstance(x, str) or (
        isinstance(x, list) and all(isinstance(name, str) and name for name in x)
    )


def _is_layers(x: Any) -> bool:
    return type(x) is int or (isinstance(x, list) and all(type(k) is int for k in x))
