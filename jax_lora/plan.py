"""What will be adapted, by which rule, and what it costs: known before anything is computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_lora.adapter import Adapter, Layout, LoraFactors, leaves_by_path, param_key
from jax_lora.config import LoraConfig
from jax_lora.discover import MATRIX_USES, Use, discover, low_rank_multiply_adds
from jax_lora.errors import AdapterError, ConfigError, TargetError, expect_type, near_misses
from jax_lora.initializers import INITIALIZERS
from jax_lora.interpreter import Interpreter
from jax_lora.rules import ALL_LINEAR, Rule, path_matches
from jax_lora.tables import count, format_table, group_numbered, spans
from jax_lora.transform import interpret


@dataclasses.dataclass(frozen=True)
class Target:
    """One weight that will be adapted.

    Attributes:
        path: The parameter's path.
        layout: The roles of its axes, read from its first use as a matrix.
        rule: The entry of ``config.targets`` that selected it.
        uses: Everything the function does with it.
        rank: The rank of its update.
        alpha: The strength of its update.
        scale: What multiplies its ``a b``.
        init: How its ``a`` starts.
        dtype: The dtype of its ``a`` and ``b``.
        materialized: Primitives at which ``W + scale a b`` is formed because no rule keeps the
            weight factored there; empty if it is factored everywhere.
    """

    path: str
    layout: Layout
    rule: str
    uses: tuple[Use, ...]
    rank: int
    alpha: float
    scale: float
    init: str
    dtype: str
    materialized: tuple[str, ...] = ()

    @property
    def trainable(self) -> int:
        """The number of trained elements."""
        return math.prod(self.layout.a_shape(self.rank)) + math.prod(self.layout.b_shape(self.rank))

    @property
    def extra_multiply_adds(self) -> int:
        """The multiply-adds that it adds to a forward pass, if it stays factored."""
        return low_rank_multiply_adds(self.layout, self.rank, self.uses)

    @property
    def largest_rank(self) -> int:
        """min(in, out), above which a rank only repeats itself."""
        return min(self.layout.fan_in, self.layout.fan_out)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The outcome of `plan`; ``print`` it to see what is adapted and what is left out.

    Attributes:
        config: The configuration.
        targets: The weights that will be adapted, by path.
        skipped: Why each other parameter is not, by path.
        base_params: The number of elements of all parameters.
        multiply_adds: Multiply-adds of the base model on the planned arguments.
    """

    config: LoraConfig
    targets: dict[str, Target]
    skipped: dict[str, str]
    base_params: int
    multiply_adds: int

    def trainable(self, path: str) -> int:
        """The number of trained elements for one target."""
        return self.targets[path].trainable

    def extra_multiply_adds(self, path: str) -> int:
        """The multiply-adds that one target adds to a forward pass, if it stays factored."""
        return self.targets[path].extra_multiply_adds

    @property
    def trainable_params(self) -> int:
        """The number of trained elements."""
        return sum(self.trainable(path) for path in self.targets)

    @property
    def adapter_bytes(self) -> int:
        """The bytes of all ``a``, ``b`` and ``scale`` arrays."""
        return sum(t.trainable * jnp.dtype(t.dtype).itemsize + 4 for t in self.targets.values())

    def __str__(self) -> str:
        return self.table()

    def table(self, *, full: bool = False) -> str:
        """The plan as text, ending with the parameters that are left out, and why.

        What is the same for all targets stands in the first line and has no column. Rows that
        differ only in numbers in their paths are one, ``layers_{0..11}/kernel x12``, with the sums
        of their trained elements and multiply-adds.

        Args:
            full: One row for every parameter.
        """
        shared, columns = _settings_columns(list(self.targets.values()))
        rows = {}
        for k, (path, target) in enumerate(self.targets.items()):
            costs = count(target.trainable), count(target.extra_multiply_adds)
            settings = (column[k] for column in columns.values())
            shape = str(list(target.layout.shape))
            rows[path] = (shape, *settings, target.rule, *costs, _note(target))
        cells = []
        for name, paths in _groups(rows, full):
            *labels, _, _, note = rows[paths[0]]
            trained = count(sum(self.targets[path].trainable for path in paths))
            extra = count(sum(self.targets[path].extra_multiply_adds for path in paths))
            cells.append((name, *labels, trained, extra, note))
        header = ("adapted", "shape", *columns, "rule", "trained", "multiply-adds", "note")
        right = (len(header) - 3, len(header) - 2)
        added = sum(target.extra_multiply_adds for target in self.targets.values())
        share = self.trainable_params / max(self.base_params, 1)
        lines = [
            f"LoRA plan: {', '.join([*shared, 'b zero'])}",
            format_table(header, _capped(cells, full), right),
            f"trained {count(self.trainable_params)} beside {count(self.base_params)} frozen "
            f"parameters ({share:.1%}), {count(self.adapter_bytes)} bytes",
            f"forward {count(self.multiply_adds)} multiply-adds + {count(added)} "
            f"({added / max(self.multiply_adds, 1):.1%})",
        ]
        if self.skipped:
            reasons = [(n, self.skipped[paths[0]]) for n, paths in _groups(self.skipped, full)]
            lines += ["", format_table(("not adapted", "because"), _capped(reasons, full))]
        return "\n".join(lines)


#: A table that is not full ends after as many rows.
_MOST_ROWS = 40


def _settings_columns(targets: list[Target]) -> tuple[list[str], dict[str, list[str]]]:
    """What all targets share, as words for the first line; and a column for each other setting."""
    shared: list[str] = []
    columns: dict[str, list[str]] = {}
    for name, title in (("rank", "rank"), ("scale", "scale"), ("dtype", ""), ("init", "a")):
        values = [getattr(target, name) for target in targets]
        words = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
        if len(set(values)) == 1:
            shared.append(f"{title} {words[0]}".strip())
        else:
            columns[title or name] = words
    return shared, columns


def _note(target: Target) -> str:
    if target.materialized:
        return f"formed at {', '.join(target.materialized)}"
    if target.rank > target.largest_rank:
        return f"rank exceeds min(in, out) = {target.largest_rank}"
    return ""


def _groups(rows: Mapping[str, Hashable], full: bool) -> list[tuple[str, list[str]]]:
    """The paths in each row of a table, with the name of the row."""
    if full:
        return [(path, [path]) for path in rows]
    groups = group_numbered(rows).items()
    return [(f"{n} x{len(p)}" if len(p) > 1 else n, p) for n, p in groups]


def _capped(rows: Sequence[tuple[str, ...]], full: bool) -> Sequence[tuple[str, ...]]:
    if full or len(rows) <= _MOST_ROWS:
        return rows
    left = f"and {len(rows) - _MOST_ROWS} more rows: plan.table(full=True)"
    return [*rows[:_MOST_ROWS], (left, *[""] * (len(rows[0]) - 1))]


def plan(
    fun: Callable[..., Any],
    params: Any,
    *args: Any,
    config: LoraConfig | None = None,
    **kwargs: Any,
) -> Plan:
    """Decide what to adapt, from how ``fun(params, *args, **kwargs)`` uses its parameters.

    The function is traced, never run: ``params`` and ``args`` may be `jax.ShapeDtypeStruct`.

    Args:
        fun: A pure function whose first argument is a pytree of parameters.
        params: The parameters.
        *args: Example arguments; only their shapes and dtypes matter.
        config: Which parameters to adapt and how; the default adapts every matrix product.
        **kwargs: Keyword arguments of ``fun``.

    Returns:
        The plan, to be printed and to be passed to `init`.

    Raises:
        TargetError: A target or exclusion that matches nothing; one that decides nothing, as
            earlier ones take all it matches; one that names what cannot be adapted, or a parameter
            that the function never uses; layers that do not exist, or that are stacked in one
            parameter. All of them at once, with the nearest paths.
        ConfigError: A rank that exceeds min(in, out) of every weight it is for.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"l1": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}
        >>> def model(params, x):
        ...     return x @ params["l1"]["kernel"] + params["l1"]["bias"]
        >>> print(plan(model, params, jnp.ones((2, 6)), config=LoraConfig(rank=2, alpha=4)))
        LoRA plan: rank 2, scale 2, float32, a kaiming, b zero
        adapted    shape   rule        trained  multiply-adds  note
        l1/kernel  [6, 4]  all-linear       20             40
        trained 20 beside 28 frozen parameters (71.4%), 84 bytes
        forward 56 multiply-adds + 40 (71.4%)
        <BLANKLINE>
        not adapted  because
        l1/bias      used by add, not as a matrix
    """
    config = LoraConfig() if config is None else config
    expect_type("a configuration", config, LoraConfig)
    uses = discover(fun, params, *args, **kwargs)
    leaves = {path: leaf for path, leaf in leaves_by_path(params).items() if path in uses}
    targets, skipped = _select(config, leaves, uses)
    planned = Plan(
        config,
        targets,
        skipped,
        base_params=sum(math.prod(leaf.shape) for leaf in leaves.values()),
        multiply_adds=sum(use.multiply_adds for found in uses.values() for use in found),
    )
    return _with_materialized(planned, fun, params, args, kwargs)


def _select(
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
        excluded = [k for k, pattern in enumerate(config.exclude) if path_matches(pattern, path)]
        for k in excluded:
            unmatched.pop(k, None)
        # Why the rules that follow have no say.
        settled = f"excluded by {config.exclude[excluded[0]]}" if excluded else ""
        reason = settled or obstacle or _unmatched(config, uses[path])
        for tally in tallies:
            if not _matches(tally.rule, path, leaf, layout, uses[path]):
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
            elif layout is None:
                problems.append(f"{path}: matched by {tally.rule.name!r} but {obstacle}")
            else:
                targets[path] = tally.target(path, layout, uses[path])
        if path not in targets:
            skipped[path] = reason
    dead = [problem for tally in tallies if (problem := tally.problem(leaves, adaptable))]
    for k, pattern in unmatched.items():
        near = near_misses(pattern, leaves)
        dead.append(f"exclude[{k}] {pattern!r} matches no parameter ({near})")
    if not adaptable:
        reasons = [f"{path}: {reason}" for path, reason in skipped.items()]
        dead += reasons or ["the first argument has no arrays in it, or is no registered pytree"]
    ranks = _rank_problems(tallies)
    if dead or problems:
        raise TargetError(
            "expected every target and exclusion to match parameters that can be adapted and that "
            "no earlier one takes; correct or exclude:\n  " + "\n  ".join(dead + problems + ranks)
        )
    if ranks:
        raise ConfigError("\n  ".join(ranks))
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

    def target(self, path: str, layout: Layout, uses: tuple[Use, ...]) -> Target:
        """One more target."""
        names = ("rank", "alpha", "scale", "init", "dtype")
        settings = {name: getattr(self.settings, name) for name in names}
        self.targets.append(Target(path, layout, self.rule.name, uses, **settings))
        return self.targets[-1]

    def outside(self, path: str) -> str:
        """Where a parameter is, if not in the rule's layers."""
        layer = self.rule.layer(path)
        if self.rule.layers is None or layer in self.rule.layers:
            return ""
        return "in no layer" if layer is None else f"in layer {layer}"

    def problem(self, leaves: Iterable[str], adaptable: int) -> str:
        """What is wrong with the rule; empty if nothing is."""
        if not self.lost and self.rule.by_path:
            near = near_misses(str(self.rule.match), (*leaves, ALL_LINEAR))
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


def _matches(
    rule: Rule, path: str, leaf: Any, layout: Layout | None, uses: tuple[Use, ...]
) -> bool:
    """Whether a rule matches a parameter, of whatever layer."""
    if isinstance(rule.match, str) and rule.by_path:
        return path_matches(rule.match, path)
    if layout is None:
        return False  # what does not name a parameter chooses among those that can be adapted
    if isinstance(rule.match, str):
        return _is_linear(uses)
    try:
        return bool(rule.match(path, tuple(leaf.shape), uses))
    except Exception as error:
        error.add_note(f"raised by the {rule.name} for {path}")
        raise


def _is_linear(uses: tuple[Use, ...]) -> bool:
    """Whether all uses as a matrix are those of a linear layer, not a convolution or a lookup."""
    return {MATRIX_USES[u.primitive] for u in uses if u.primitive in MATRIX_USES} == {"linear"}


def _unmatched(config: LoraConfig, uses: tuple[Use, ...]) -> str:
    """Why no rule takes a parameter that could be adapted."""
    if all(rule.match != ALL_LINEAR for rule in config.rules):
        return "no target matches it"
    kinds = dict.fromkeys(MATRIX_USES[u.primitive] for u in uses if u.primitive in MATRIX_USES)
    return f"used as {' and '.join(kinds)}, and {ALL_LINEAR!r} adapts linear layers alone"


def _rank_problems(tallies: list[_Tally]) -> list[str]:
    """Ranks above min(in, out) of every weight they are for: a rule's own, and the config's."""
    found = {t.label + ": ": t.targets for t in tallies if t.rule.rank is not None}
    found[""] = [target for t in tallies if t.rule.rank is None for target in t.targets]
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
    if not uses:
        return None, "the function never uses it"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return None, f"its dtype is {leaf.dtype}, not floating-point"
    for use in uses:
        layout = use.layout(tuple(leaf.shape))
        if layout is not None:
            return layout, ""
    names = ", ".join(dict.fromkeys(use.primitive for use in uses))
    return None, f"used by {names}, not as a matrix"


def _with_materialized(
    planned: Plan, fun: Callable[..., Any], params: Any, args: tuple[Any, ...], kwargs: Any
) -> Plan:
    """The plan with the places noted at which a weight cannot stay factored."""
    interpreter = Interpreter()
    adapter = jax.eval_shape(lambda: init(jax.random.key(0), params, planned))

    # Leaves that are not arrays have to reach the function as they are, so only arrays are traced.
    leaves, treedef = jax.tree.flatten((params, args, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")}

    def run(adapter: Adapter, arrays: dict[int, Any]) -> None:
        filled = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        params, args, kwargs = jax.tree.unflatten(treedef, filled)
        interpret(interpreter, fun, params, adapter, args, kwargs)

    jax.eval_shape(run, adapter, arrays)
    formed: dict[str, dict[str, None]] = {}
    for event in interpreter.events:
        if not event.factored:
            formed.setdefault(event.path, {})[event.primitive] = None
    targets = {
        path: dataclasses.replace(target, materialized=tuple(formed.get(path, ())))
        for path, target in planned.targets.items()
    }
    return dataclasses.replace(planned, targets=targets)


def init(key: jax.Array, params: Any, plan: Plan) -> Adapter:
    """A fresh adapter: ``a`` random, ``b`` zero, so that the adapted model is the base model.

    Each ``a`` is drawn from a key folded with its parameter's path: adding a layer to the model
    never changes the initialisation of another.

    Args:
        key: A JAX PRNG key.
        params: The parameters that the plan was made for; they are not changed.
        plan: The plan.

    Returns:
        The adapter, with ``a: [*stack, *in, r]`` and ``b: [*stack, r, *out]`` of each target's
        rank and dtype, and a float32 ``scale``.

    Raises:
        AdapterError: The parameters are not those of the plan.
    """
    expect_type("a plan", plan, Plan)
    leaves = leaves_by_path(params)
    entries: dict[str, LoraFactors] = {}
    problems = []
    for path, target in plan.targets.items():
        layout = target.layout
        if path not in leaves or tuple(leaves[path].shape) != layout.shape:
            found = tuple(leaves[path].shape) if path in leaves else near_misses(path, leaves)
            problems.append(f"{path}: expected shape {layout.shape}, found {found}")
            continue
        a = INITIALIZERS[target.init](param_key(key, path), layout, target.rank)
        entries[path] = LoraFactors(
            a=a.astype(target.dtype),
            b=jnp.zeros(layout.b_shape(target.rank), target.dtype),
            scale=jnp.asarray(target.scale, jnp.float32),
            layout=layout,
        )
    if problems:
        raise AdapterError("these are not the planned parameters:\n  " + "\n  ".join(problems))
    return Adapter(entries)
