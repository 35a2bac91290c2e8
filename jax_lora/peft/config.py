"""``adapter_config.json``: read whole or refused, and which modules it means."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jax_lora.errors import CheckpointError
from jax_lora.peft.patterns import Expressions, is_literal, pattern_problem

#: What PEFT calls the methods that are read, and where each has its alpha.
METHODS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
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
#: Those of LoHa and LoKr: dropout, the start, and what the shapes of the tensors say.
_IDLE_PRODUCTS = frozenset(
    {
        "rank_dropout",
        "rank_dropout_scale",
        "module_dropout",
        "init_weights",
        "use_effective_conv2d",
        "decompose_both",
        "decompose_factor",
    }
)
#: Ways of starting that leave the base as it is.
_PLAIN_STARTS = ("default", "gaussian", "eva", "orthogonal", "mica")
#: Ways of starting that subtract the factors at the start from the base.
_SUBTRACTED = ("pissa", "olora", "corda", "lora_ga")
_MAX_LETTERS = 200_000
_BIASES = ("none", "all", "lora_only")
#: Of which names PEFT takes a module for one that can be tied.
_TIED = frozenset({"embed_tokens", "lm_head"})


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What an ``adapter_config.json`` says about the adapter's mathematics.

    Attributes:
        rank: The rank of modules that no pattern matches.
        alpha: Their alpha.
        targets: The adapted modules: ends of their names, or one regular expression.
        method: ``LORA``, ``LOHA`` or ``LOKR``.
        rank_pattern: Ranks by regular expression; the first that matches decides.
        alpha_pattern: Alphas likewise.
        rslora: Whether the scale is alpha/sqrt(r), and not alpha/r.
        dora: Whether all modules are DoRA.
        bias: Which biases are trained: ``none``, ``all``, or ``lora_only``, those beside factors.
        exclude: Modules that are not adapted, named as the targets are.
        layers: The layers that are, or None for all.
        layers_pattern: What comes before a layer's number.
        saved: Ends of the names of modules that are trained whole.
        tokens: By the ends of names of tables, the rows that are trained; for the name ``""``,
            those of whichever table the file has.
        start: How the factors started, if the base was changed for it; else empty.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] | str
    method: str = "LORA"
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    bias: str = "none"
    exclude: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    tokens: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
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
        method = fields.take("peft_type", lambda x: isinstance(x, str), "text", "")
        if method not in METHODS:
            fields.problems.append(
                f"peft_type: expected one of {', '.join(METHODS)}, found {method!r}"
            )
        of_lora = method not in METHODS or method == "LORA"
        layers = fields.take("layers_to_transform", _is_layers, "a number or numbers", None)
        layers = (layers,) if isinstance(layers, int) else layers
        rank_is = "a positive integer"
        found = cls(
            method=method,
            rank=fields.take("r", _is_rank, rank_is),
            alpha=fields.take(METHODS.get(method, "lora_alpha"), _is_number, "a number"),
            rank_pattern=fields.patterns("rank_pattern", _is_rank, rank_is),
            alpha_pattern=fields.patterns("alpha_pattern", _is_number, "a number"),
            targets=fields.names("target_modules", required=True),
            exclude=fields.names("exclude_modules"),
            layers=tuple(layers) if layers else None,
            layers_pattern=_as_tuple(fields.names("layers_pattern")),
            saved=_as_tuple(fields.names("modules_to_save")),
            **(fields.of_lora() if of_lora else {}),
        )
        for field, patterns in (
            ("layers_pattern", found.layers_pattern),
            ("modules_to_save", found.saved),
        ):
            # Both are names that PEFT puts into a regular expression as they are.
            for pattern in patterns:
                fields.check_pattern(field, pattern)
        fields.refuse_tying(found)
        if found.targets == "all-linear":
            fields.problems.append(
                "target_modules: expected the modules' names, found 'all-linear', for which PEFT "
                "writes them when it saves"
            )
        fields.refuse_what_is_left(_IDLE if of_lora else _IDLE | _IDLE_PRODUCTS)
        if fields.problems:
            raise CheckpointError(
                f"{where}: not an adapter that can be read:\n  " + "\n  ".join(fields.problems)
            )
        return found

    @functools.cached_property
    def _expressions(self) -> Expressions:
        return Expressions()

    @functools.cached_property
    def _ranks(self) -> tuple[list[str], list[Any]]:
        return _by_ends(self.rank_pattern)

    @functools.cached_property
    def _alphas(self) -> tuple[list[str], list[Any]]:
        return _by_ends(self.alpha_pattern)

    def rank_of(self, module: str) -> int:
        """The rank of a module."""
        patterns, ranks = self._ranks
        found = self._expressions.first(patterns, module)
        return self.rank if found is None else ranks[found]

    def scale_of(self, module: str) -> float:
        """What multiplies a module's update."""
        patterns, alphas = self._alphas
        found = self._expressions.first(patterns, module)
        alpha, rank = self.alpha if found is None else alphas[found], self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def is_saved(self, module: str) -> bool:
        """Whether a module, or one that it is in, is trained whole."""
        parts = module.split(".")
        within = (".".join(parts[: k + 1]) for k in range(len(parts)))
        return any(name.endswith(end) for name in within for end in self.saved)

    def has_bias(self, module: str) -> bool:
        """Whether the bias of a module is trained, apart from whole modules."""
        return self.bias == "all" or (self.bias == "lora_only" and self.is_target(module))

    def rows_of(self, module: str) -> tuple[int, ...] | None:
        """The rows of a module's table that are trained; None if none are."""
        of_mine = (x for x in self.tokens.items() if _ends_with(module, frozenset({x[0]})))
        found = (rows for _, rows in of_mine)
        return next(found, self.tokens.get(""))

    def is_target(self, module: str) -> bool:
        """Whether a module is adapted: PEFT's own rule, in its order."""
        match = self._expressions.match
        if isinstance(self.exclude, str):
            if match(self.exclude, module, whole=True):
                return False
        elif _ends_with(module, self._excluded):
            return False
        if any(match(rf"(^|.*\.){end}($|\..*)", module) for end in self.saved):
            return False
        if isinstance(self.targets, str):
            return match(self.targets, module, whole=True) is not None
        if module in self._named:
            return True
        if not _ends_with(module, self._named):
            return False
        if self.layers is None:
            return True
        # The first numbered component is the layer: a later one may be an expert.
        before = self.layers_pattern or (r"[^.]*",)
        start = r"(?:^|.*?\.)" if self.layers_pattern else r".*?\."
        matches = (match(rf"{start}{pattern}\.(\d+)\.", module) for pattern in before)
        layer = next((int(found[1]) for found in matches if found), None)
        return layer in self.layers

    @functools.cached_property
    def _named(self) -> frozenset[str]:
        return frozenset(self.targets)

    @functools.cached_property
    def _excluded(self) -> frozenset[str]:
        return frozenset(self.exclude)


def adapter_config(
    *,
    rank: int,
    alpha: float,
    targets: tuple[str, ...] | str,
    saved: Iterable[str],
    bias: str,
    tokens: Mapping[str, Iterable[int]],
    rank_pattern: Mapping[str, int],
    alpha_pattern: Mapping[str, float],
    fan_in_fan_out: bool,
) -> dict[str, Any]:
    """The smallest configuration that PEFT reads, with everything it needs."""
    found: dict[str, Any] = {
        "alpha_pattern": dict(alpha_pattern),
        "bias": bias,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "modules_to_save": list(saved) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": dict(rank_pattern),
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "use_rslora": False,
    }
    if tokens:
        found["trainable_token_indices"] = {name: list(rows) for name, rows in tokens.items()}
    return found


class _Fields:
    """The fields that are not taken yet, and what is wrong with those that are."""

    def __init__(self, data: dict[str, Any]):
        self.data = data
        self.problems: list[str] = []
        self.letters = 0

    def take(self, name: str, right: Callable[[Any], bool], what: str, *default: Any) -> Any:
        value = self.data.pop(name, None)
        if value is None and default:
            return default[0]
        if not right(value):
            self.problems.append(f"{name}: expected {what}, found {_shown(value)}")
            return default[0] if default else 1
        return value

    def of_lora(self) -> dict[str, Any]:
        """What LoRA's configuration has beyond those of the others."""
        flag = "true or false"
        return {
            "rslora": self.take("use_rslora", _is_bool, flag, False),
            "dora": self.take("use_dora", _is_bool, flag, False),
            "bias": self.take("bias", _BIASES.__contains__, f"one of {', '.join(_BIASES)}", "none"),
            "tokens": self.tokens(),
            "start": self.start(),
        }

    def names(self, name: str, *, required: bool = False) -> Any:
        value = self.take(name, _is_names, "names of modules, or a regular expression", ())
        if required and not value:
            self.problems.append(f"{name}: expected names of modules, found none")
        if isinstance(value, str):
            self.check_pattern(name, value)
            return value
        return tuple(value)

    def patterns(self, name: str, right: Callable[[Any], bool], what: str) -> dict[str, Any]:
        value = self.take(name, lambda x: isinstance(x, dict), "an object", {})
        for pattern, x in value.items():
            self.check_pattern(name, pattern)
            if not right(x):
                self.problems.append(
                    f"{name}: expected {what} for {_shown(pattern)}, found {_shown(x)}"
                )
        return value

    def tokens(self) -> dict[str, tuple[int, ...]]:
        what = "different rows, or such by the name of a module"
        value = self.take("trainable_token_indices", _is_tokens, what, {})
        tables = value if isinstance(value, dict) else {"": value}
        return {name: tuple(rows) for name, rows in tables.items() if rows}

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
            f"init_lora_weights: {_shown(value)} is not a start that leaves the base as it is"
        )
        return ""

    def check_pattern(self, name: str, pattern: str) -> None:
        self.letters += 0 if is_literal(pattern) else len(pattern)
        if self.letters > _MAX_LETTERS:  # which takes long to compile
            problem = f"more than {_MAX_LETTERS:,} letters of regular expressions"
            if problem not in self.problems:
                self.problems.append(problem)
        elif problem := pattern_problem(pattern):
            shown = pattern if len(pattern) < 80 else f"{pattern[:77]}..."
            self.problems.append(f"{name}: {shown!r}: {problem}")

    def refuse_tying(self, found: PeftConfig) -> None:
        """Of a table that is the head, too; without one among the modules it says nothing."""
        tying = self.take("ensure_weight_tying", _is_bool, "true or false", False)
        expression = isinstance(found.targets, str)
        ends = {name.rpartition(".")[2] for name in (*found.targets, *found.saved)}
        if tying and (expression or ends & _TIED):
            self.problems.append(
                "ensure_weight_tying: one adapter of a table and of a head that are one parameter "
                "is not implemented"
            )

    def refuse_what_is_left(self, idle: frozenset[str]) -> None:
        for name, value in self.data.items():
            if name not in idle and value not in (None, False, "", [], {}):
                self.problems.append(
                    f"{_shown(name)[1:-1]}: is set to {_shown(value)}, which is not implemented "
                    "here, and ignoring it would give another model"
                )


def _by_ends(patterns: Mapping[str, Any]) -> tuple[list[str], list[Any]]:
    """PEFT's rule: a key matches the end of a name, from a dot or from the beginning on."""
    return [rf"(.*\.)?({key})$" for key in patterns], list(patterns.values())


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) < 60 else f"{shown[:57]}..."


def _ends_with(module: str, ends: frozenset[str]) -> bool:
    parts = module.split(".")
    return any(".".join(parts[k:]) in ends for k in range(len(parts)))


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


def _is_tokens(x: Any) -> bool:
    if isinstance(x, dict):
        return all(isinstance(rows, list) and _is_tokens(rows) for rows in x.values())
    rows = isinstance(x, list) and all(type(k) is int and 0 <= k < 2**31 for k in x)
    return rows and len(set(x)) == len(x)
