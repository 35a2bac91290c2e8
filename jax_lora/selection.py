"""Which parameters a configuration selects, and the account of every rule.

Every parameter ends as a target or with the reason why it is none; every rule and exclusion decides
about something, or is an error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from jax_lora.adapter import Layout, Settings, Variant
from jax_lora.config import LoraConfig
from jax_lora.discover import MATRIX_USES, Use, low_rank_multiply_adds
from jax_lora.errors import ConfigError, TargetError
from jax_lora.initializers import FROM_WEIGHT
from jax_lora.rules import ALL_LINEAR, PRESETS, Mode, Rule, meant, path_matches
from jax_lora.tables import spans
from jax_lora.variants import VARIANTS


@dataclasses.dataclass(frozen=True)
class Target:
    """One parameter that will be adapted.

    Attributes:
        path: The parameter's path.
        shape: Its shape.
        layout: The roles of its axes, read from its first use as a matrix; None if it is trained
            whole and has none.
        rule: The entry of ``config.targets`` that selected it.
        uses: Everything the function does with it.
        rank: The rank of its update; 0 if it is trained whole.
        alpha: The strength of its update.
        scale: What multiplies its update.
        init: How its factors start; empty if its variant has one way alone.
        dtype: The dtype of what is trained.
        variant: What kind of update it is.
        dropout: The probability of dropout of its update's input.
        rows: The rows that are trained, if only these are.
        mode: What a product with it does.
        decided: What mode ``"auto"`` decides at each of its products.
        materialized: Primitives at which the adapted weight is formed because no rule keeps it
            factored there; empty if it is factored everywhere.
    """

    path: str
    shape: tuple[int, ...]
    layout: Layout | None
    rule: str
    uses: tuple[Use, ...]
    rank: int
    alpha: float
    scale: float
    init: str
    dtype: str
    variant: str = "lora"
    dropout: float = 0.0
    rows: tuple[int, ...] = ()
    mode: Mode = "factored"
    decided: tuple[str, ...] = ()
    materialized: tuple[str, ...] = ()

    @property
    def entry(self) -> type[Variant]:
        """What an adapter holds for it."""
        return VARIANTS[self.variant]

    @property
    def settings(self) -> Settings:
        """What its entry is made from."""
        return Settings(
            self.shape, self.layout, self.rank, self.scale, self.init, self.dtype, self.rows
        )

    @property
    def trainable(self) -> int:
        """The number of trained elements."""
        shapes = self.entry.shapes(self.settings)
        return sum(math.prod(shapes[name]) for name in self.entry.TRAINED)

    @property
    def extra_multiply_adds(self) -> int:
        """The multiply-adds that it adds to a forward pass, if it stays factored."""
        inner = self.entry.inner_rank(self.settings)
        if self.layout is None or not inner:
            return 0
        rows = low_rank_multiply_adds(self.layout, inner, self.uses)
        return rows + self.entry.multiply_adds(self.settings)

    @property
    def largest_rank(self) -> int:
        """min(in, out), above which a rank only repeats itself."""
        assert self.layout is not None
        return min(self.layout.fan_in, self.layout.fan_out)


def select(
    config: LoraConfig, leaves: dict[str, Any], uses: dict[str, tuple[Use, ...]]
) -> tuple[dict[str, Target], dict[str, str]]:
    """Sort every parameter into targets and skipped ones, and account for every rule."""
    targets: dict[str, Target] = {}
    skipped: dict[str, str] = {}
    problems: list[str] = []
    tallies = [_Tally.of(k, rule, config) for k, rule in enumerate(config.rules)]
    unmatched = dict(enumerate(config.exclude))
    adaptable = 0
    for path, leaf in leaves.items():
        layout, obstacle = _layout_of(leaf, uses[path])
        adaptable += layout is not None
        whole_obstacle = _untrainable(leaf, uses[path])
        excluded = [k for k, pattern in enumerate(config.exclude) if path_matches(pattern, path)]
        for k in excluded:
            unmatched.pop(k, None)
        # Why the rules that follow have no say.
        settled = f"excluded by {config.exclude[excluded[0]]}" if excluded else ""
        reason = settled or obstacle or _unmatched(config, uses[path])
        for tally in tallies:
            hindrance = whole_obstacle if tally.whole else obstacle
            if not _matches(tally.rule, path, leaf, not hindrance, uses[path]):
                continue
            outside = tally.outside(path)
            tally.lost[path] = outside or settled
            if settled:
                continue
            stacked = layout.stack_axes if layout and tally.rule.layer(path) is None else ()
            if outside and not stacked:
                reason = obstacle or "outside the layers of the targets that match it"
                continue
            settled, tally.lost[path] = f"taken by {tally.label}", ""
            if outside:
                problems.append(
                    f"{path}: {tally.label} cannot take some of its layers, as they are stacked "
                    f"in one parameter of shape {list(leaf.shape)}; leave out layers="
                )
            elif hindrance or (hindrance := tally.rows_problem(layout, uses[path])):
                problems.append(f"{path}: matched by {tally.rule.name!r} but {hindrance}")
            else:
                targets[path] = tally.target(path, leaf, layout, uses[path])
        if path not in targets:
            skipped[path] = reason
    dead = [problem for tally in tallies if (problem := tally.problem(leaves, adaptable))]
    for k, pattern in unmatched.items():
        dead.append(f"exclude[{k}] {pattern!r} matches no parameter ({meant(pattern, leaves)})")
    if not adaptable and not targets:
        reasons = [f"{path}: {reason}" for path, reason in skipped.items()]
        dead += reasons or ["the first argument has no arrays in it, or is no registered pytree"]
    values = _rank_problems(tallies) + [p for tally in tallies for p in tally.value_problems()]
    if dead or problems:
        raise TargetError(
            "expected every target and exclusion to match parameters that can be adapted and that "
            "no earlier one takes; correct or exclude:\n  " + "\n  ".join(dead + problems + values)
        )
    if values:
        raise ConfigError("\n  ".join(values))
    return targets, skipped


@dataclasses.dataclass
class _Tally:
    """What became of the parameters that a rule matches.

    Attributes:
        rule: The rule.
        label: The rule and its place.
        settings: What it does to its targets.
        targets: Its targets.
        lost: Of every parameter that it matches, why it does not decide about it; empty if it does.
    """

    rule: Rule
    label: str
    settings: LoraConfig
    targets: list[Target] = dataclasses.field(default_factory=list)
    lost: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, place: int, rule: Rule, config: LoraConfig) -> _Tally:
        settings = dataclasses.replace(config, **rule.overrides)
        return cls(rule, f"targets[{place}] {rule.name!r}", settings)

    @property
    def variant(self) -> str:
        """What its targets become."""
        return "rows" if self.rule.rows is not None else self.settings.variant

    @property
    def whole(self) -> bool:
        """Whether any parameter can be a target, as the roles of its axes do not matter."""
        return self.variant == "full"

    def target(self, path: str, leaf: Any, layout: Layout | None, uses: tuple[Use, ...]) -> Target:
        """One more target."""
        settings, entry = self.settings, VARIANTS[self.variant]
        low_rank = not entry.WHOLE
        self.targets.append(
            Target(
                path,
                tuple(leaf.shape),
                layout,
                self.rule.name,
                uses,
                rank=settings.rank if low_rank else 0,
                alpha=settings.alpha,
                scale=settings.scale if low_rank else 1.0,
                init=settings.init if entry.INITS else "",
                dtype=settings.dtype,
                variant=self.variant,
                dropout=settings.dropout if low_rank else 0.0,
                mode=settings.mode if low_rank else "factored",
                rows=tuple(self.rule.rows or ()),
            )
        )
        return self.targets[-1]

    def rows_problem(self, layout: Layout | None, uses: tuple[Use, ...]) -> str:
        """Why the rule's rows cannot be trained in a parameter; empty if they can."""
        rows = self.rule.rows
        if rows is None or layout is None:
            return ""
        if len(layout.in_axes) != 1:
            return f"it has no rows: its in-axes are {layout.in_axes}"
        if all(use.primitive != "gather" or use.in_axes != layout.in_axes for use in uses):
            # In a head that is not tied to a table, a token has a column.
            return "the function never looks up its rows"
        beyond = [k for k in rows if k >= layout.fan_in]
        return f"it has {layout.fan_in} rows, and none of {spans(beyond)}" if beyond else ""

    def value_problems(self) -> list[str]:
        """Values of the rule that do not go together."""
        problems = []
        inits, init = VARIANTS[self.variant].INITS, self.settings.init
        # A configuration's init is not for the other variant that a rule has.
        meant = self.rule.init is not None or (self.rule.variant is None and not self.rule.rows)
        if meant and init not in inits and (inits or init != LoraConfig.init):
            how = f"one of {', '.join(inits)}" if inits else "none, as it has a start of its own"
            problems.append(
                f"{self.label}: expected init for variant {self.variant!r} to be {how}; "
                f"got {init!r}"
            )
        if inits and init in FROM_WEIGHT and not self.settings.scale > 0:
            problems.append(
                f"{self.label}: expected a positive alpha with init {init!r}, which divides by the "
                f"scale; got alpha={self.settings.alpha}"
            )
        if VARIANTS[self.variant].WHOLE:
            # A configuration's are for its other targets.
            unused = ("rank", "alpha", "scaling", "dropout", "mode")
            problems += [
                f"{self.label}: expected no {name} for what is trained whole, as there is no "
                f"update beside it; got {name}={value!r}"
                for name, value in self.rule.overrides.items()
                if name in unused
            ]
        return problems

    def outside(self, path: str) -> str:
        """Where a parameter is, if not in the rule's layers."""
        layer = self.rule.layer(path)
        if self.rule.layers is None or layer in self.rule.layers:
            return ""
        return "in no layer" if layer is None else f"in layer {layer}"

    def problem(self, leaves: Iterable[str], adaptable: int) -> str:
        """What is wrong with the rule; empty if nothing is."""
        if not self.lost and self.rule.by_path:
            near = meant(str(self.rule.match), leaves, PRESETS)
            return f"{self.label} matches no parameter ({near})"
        if not self.lost:
            return f"{self.label} matches none of the {adaptable} parameters that can be adapted"
        layers = [layer for p in self.lost if (layer := self.rule.layer(p)) is not None]
        missing = set(self.rule.layers or ()) - set(layers)
        if missing and layers:
            return f"{self.label} matches layers {spans(layers)}, and none of {spans(missing)}"
        if not all(self.lost.values()):
            return ""
        paths = [f"{path!r} is {why}" for path, why in self.lost.items()]
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        return f"{self.label} decides nothing: {', '.join(paths[:3])}{more}"


def _matches(rule: Rule, path: str, leaf: Any, adaptable: bool, uses: tuple[Use, ...]) -> bool:
    """Whether a rule matches a parameter, of whatever layer."""
    if isinstance(rule.match, str) and rule.by_path:
        return path_matches(rule.match, path)
    if not adaptable:
        return False  # what does not name a parameter chooses among those that can be adapted
    if isinstance(rule.match, str):
        return _in_preset(rule.match, uses)
    try:
        return bool(rule.match(path, tuple(leaf.shape), uses))
    except Exception as error:
        error.add_note(f"raised by the {rule.name} for {path}")
        raise


def _kinds(uses: tuple[Use, ...]) -> list[str]:
    """What the uses as a matrix are called."""
    names = (MATRIX_USES[use.primitive] for use in uses if use.primitive in MATRIX_USES)
    return list(dict.fromkeys(names))


def _in_preset(name: str, uses: tuple[Use, ...]) -> bool:
    """Whether a preset selects a weight of these uses."""
    kinds, wanted = _kinds(uses), PRESETS[name]
    return wanted in kinds if wanted == "embedding" else wanted == "" or kinds == [wanted]


def _unmatched(config: LoraConfig, uses: tuple[Use, ...]) -> str:
    """Why no rule takes a parameter that could be adapted."""
    if all(rule.match != ALL_LINEAR for rule in config.rules):
        return "no target matches it"
    kinds = " and ".join(_kinds(uses))
    return f"used as {kinds}, and {ALL_LINEAR!r} adapts linear layers alone"


def _rank_problems(tallies: list[_Tally]) -> list[str]:
    """Ranks above min(in, out) of every weight they are for: a rule's own, and the config's."""
    limited = [t for t in tallies if VARIANTS[t.variant].MAX_RANK]
    found = {t.label + ": ": t.targets for t in limited if t.rule.rank is not None}
    found[""] = [target for t in limited if t.rule.rank is None for target in t.targets]
    problems = []
    for label, targets in found.items():
        largest = max((target.largest_rank for target in targets), default=0)
        if targets and targets[0].rank > largest:
            problems.append(
                f"{label}expected a rank of at most {largest}, the largest min(in, out) of the "
                "adapted weights, above which a rank only repeats itself; "
                f"got rank={targets[0].rank}"
            )
    return problems


def _layout_of(leaf: Any, uses: tuple[Use, ...]) -> tuple[Layout | None, str]:
    """The layout of a parameter's first use as a matrix, or why there is none."""
    if obstacle := _untrainable(leaf, uses):
        return None, obstacle
    for use in uses:
        layout = use.layout(tuple(leaf.shape))
        if layout is not None:
            return layout, ""
    names = ", ".join(dict.fromkeys(use.primitive for use in uses))
    return None, f"used by {names}, not as a matrix"


def _untrainable(leaf: Any, uses: tuple[Use, ...]) -> str:
    """Why nothing about a parameter can be trained; empty if something can."""
    if not uses:
        return "the function never uses it"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"its dtype is {leaf.dtype}, not floating-point"
    return ""
