"""What will be adapted, by which rule, and what it costs: known before anything is computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax

from jax_lora.adapter import (
    Adapter,
    Entry,
    check_key,
    is_inexact,
    leaves_by_path,
    param_key,
)
from jax_lora.config import LoraConfig
from jax_lora.discover import discover
from jax_lora.errors import AdapterError, ConfigError, expect_type, near_misses
from jax_lora.initializers import FROM_WEIGHT
from jax_lora.interpreter import Interpreter
from jax_lora.rules import Mode
from jax_lora.selection import Target, select
from jax_lora.tables import count, format_table, group_numbered
from jax_lora.transform import interpret


@dataclasses.dataclass(frozen=True)
class Plan:
    """The outcome of `plan`; ``print`` it to see what is adapted and what is left out.

    Attributes:
        config: The configuration.
        targets: The weights that will be adapted, by path.
        skipped: Why each other parameter is not, by path.
        base_params: The number of elements of all parameters.
        multiply_adds: Multiply-adds of the base model on the planned arguments.
        adapter_bytes: The bytes of all arrays of the adapter.
    """

    config: LoraConfig
    targets: dict[str, Target]
    skipped: dict[str, str]
    base_params: int
    multiply_adds: int
    adapter_bytes: int = 0

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
    def modes(self) -> dict[str, Mode]:
        """The modes for `jax_lora.apply`, by path."""
        return {path: target.mode for path, target in self.targets.items()}

    @property
    def dropout(self) -> dict[str, float]:
        """The rates for `jax_lora.dropout`, by path."""
        return {path: target.dropout for path, target in self.targets.items() if target.dropout}

    def __str__(self) -> str:
        return self.table()

    def _start(self) -> list[str]:
        """What is true of the start of all factors."""
        plain = all(t.variant in ("lora", "lora-fa", "dora") for t in self.targets.values())
        return ["b zero"] if plain and not self._anchored() else []

    def _anchored(self) -> bool:
        return any(target.init in FROM_WEIGHT for target in self.targets.values())

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
            shape = str(list(target.shape))
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
            f"LoRA plan: {', '.join(shared + self._start())}",
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
    neutral = {"variant": "lora", "dropout": "0"}
    for name, title in (
        *(("variant", ""), ("rank", "rank"), ("scale", "scale"), ("dtype", "")),
        *(("init", "a"), ("dropout", "dropout")),
    ):
        words = [_word(target, name) for target in targets]
        if len(set(words)) > 1:
            columns[title or name] = words
        elif words[0] and words[0] != neutral.get(name):
            shared.append(f"{title} {words[0]}".strip())
    return shared, columns


def _word(target: Target, name: str) -> str:
    """A setting of a target in the table; empty where it plays no role."""
    if target.variant in ("full", "rows") and name in ("rank", "scale"):
        return ""
    value = getattr(target, name)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _note(target: Target) -> str:
    if target.materialized:
        return f"formed at {', '.join(target.materialized)}"
    if target.decided:
        return f"auto: {'; '.join(target.decided)}"
    if target.mode == "materialize":
        return "formed, as asked for"
    if target.dropout and all(use.primitive == "gather" for use in target.uses):
        return "no dropout: its rows are looked up"
    if target.entry.MAX_RANK and target.rank > target.largest_rank:
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
        ConfigError: A rank that exceeds min(in, out) of every weight it is for; arguments that
            cannot be examples, or a first one that is no function.

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
    if any(isinstance(arg, LoraConfig) for arg in args):
        raise ConfigError(
            "expected example arguments of the function, got a LoraConfig; pass config=... by name"
        )
    uses = discover(fun, params, *args, **kwargs)
    leaves = {path: leaf for path, leaf in leaves_by_path(params).items() if path in uses}
    targets, skipped = select(config, leaves, uses)
    planned = Plan(
        config,
        targets,
        skipped,
        base_params=sum(math.prod(leaf.shape) for leaf in leaves.values()),
        multiply_adds=sum(use.multiply_adds for found in uses.values() for use in found),
    )
    return _with_materialized(planned, fun, params, args, kwargs)


def _with_materialized(
    planned: Plan, fun: Callable[..., Any], params: Any, args: tuple[Any, ...], kwargs: Any
) -> Plan:
    """The plan with the places noted at which a weight cannot stay factored."""
    interpreter = Interpreter(modes=planned.modes)
    leaves_of = leaves_by_path(params)
    weights = {path: leaves_of[path] for path in planned.targets}
    adapter = jax.eval_shape(lambda w: _fresh(jax.random.key(0), w, planned), weights)

    # Leaves that are not arrays have to reach the function as they are, so only arrays are traced.
    leaves, treedef = jax.tree.flatten((params, args, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")}

    def run(adapter: Adapter, arrays: dict[int, Any]) -> None:
        filled = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        params, args, kwargs = jax.tree.unflatten(treedef, filled)
        interpret(interpreter, fun, params, adapter, args, kwargs)

    jax.eval_shape(run, adapter, arrays)
    targets = {}
    for path, target in planned.targets.items():
        events = [event for event in interpreter.events if event.path == path]
        forced = [e.primitive for e in events if not e.factored and not e.decided]
        decided = [e.decided for e in events if e.decided] if target.mode == "auto" else []
        targets[path] = dataclasses.replace(
            target,
            materialized=tuple(dict.fromkeys(forced)),
            decided=tuple(dict.fromkeys(decided)),
        )
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(adapter))
    return dataclasses.replace(planned, targets=targets, adapter_bytes=size)


def init(key: jax.Array, params: Any, plan: Plan) -> Adapter:
    """A fresh adapter, with which the adapted model is the base model.

    What is random of an entry is drawn from a key folded with its parameter's path: adding a layer
    to the model never changes the initialisation of another.

    Args:
        key: A JAX PRNG key.
        params: The parameters that the plan was made for; they are not changed.
        plan: The plan.

    Returns:
        The adapter: for each target what its variant has, in LoRA ``a: [*stack, *in, r]`` and
        ``b: [*stack, r, *out]`` of the target's rank and dtype, and a float32 ``scale``.

    Raises:
        AdapterError: The parameters are not those of the plan.
        ConfigError: The key is none.
    """
    check_key(key)
    expect_type("a plan", plan, Plan)
    leaves = leaves_by_path(params)
    problems = []
    for path, target in plan.targets.items():
        if path not in leaves or tuple(leaves[path].shape) != target.shape:
            found = tuple(leaves[path].shape) if path in leaves else near_misses(path, leaves)
            problems.append(f"{path}: expected shape {target.shape}, found {found}")
        elif not is_inexact(leaves[path]):
            problems.append(f"{path}: expected floats, found {leaves[path].dtype}")
    if problems:
        raise AdapterError("these are not the planned parameters:\n  " + "\n  ".join(problems))
    return _fresh(key, {path: leaves[path] for path in plan.targets}, plan)


def _fresh(key: jax.Array, weights: Mapping[str, Any], plan: Plan) -> Adapter:
    entries: dict[str, Entry] = {}
    for path, target in plan.targets.items():
        entries[path] = target.entry.create(param_key(key, path), weights[path], target.settings)
    return Adapter(entries)
