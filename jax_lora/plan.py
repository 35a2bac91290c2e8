"""What will be adapted, by which rule, and what it costs: known before anything is computed."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_lora.adapter import Adapter, Layout, LoraFactors, leaves_by_path
from jax_lora.config import ALL_LINEAR, LoraConfig, glob_matches
from jax_lora.discover import MATRIX_USES, Use, discover, low_rank_multiply_adds
from jax_lora.errors import AdapterError, ConfigError, TargetError, near_misses
from jax_lora.initializers import INITIALIZERS
from jax_lora.interpreter import Interpreter
from jax_lora.tables import count, format_table
from jax_lora.transform import interpret


@dataclasses.dataclass(frozen=True)
class Target:
    """One weight that will be adapted.

    Attributes:
        path: The parameter's path.
        layout: The roles of its axes, read from its first use as a matrix.
        rule: The entry of ``config.targets`` that selected it.
        uses: Everything the function does with it.
        materialized: Primitives at which ``W + scale a b`` is formed because no rule keeps the
            weight factored there; empty if it is factored everywhere.
    """

    path: str
    layout: Layout
    rule: str
    uses: tuple[Use, ...]
    materialized: tuple[str, ...] = ()


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
        layout, rank = self.targets[path].layout, self.config.rank
        return math.prod(layout.a_shape(rank)) + math.prod(layout.b_shape(rank))

    def extra_multiply_adds(self, path: str) -> int:
        """The multiply-adds that one target adds to a forward pass, if it stays factored."""
        target = self.targets[path]
        return low_rank_multiply_adds(target.layout, self.config.rank, target.uses)

    @property
    def trainable_params(self) -> int:
        """The number of trained elements."""
        return sum(self.trainable(path) for path in self.targets)

    @property
    def adapter_bytes(self) -> int:
        """The bytes of all ``a``, ``b`` and ``scale`` arrays."""
        itemsize = jnp.dtype(self.config.dtype).itemsize
        return self.trainable_params * itemsize + 4 * len(self.targets)

    def __str__(self) -> str:
        rows = []
        for path, target in self.targets.items():
            layout = target.layout
            note = f"formed at {', '.join(target.materialized)}" if target.materialized else ""
            if not note and self.config.rank > min(layout.fan_in, layout.fan_out):
                note = f"rank exceeds min(in, out) = {min(layout.fan_in, layout.fan_out)}"
            rows.append(
                (
                    path,
                    str(list(layout.shape)),
                    target.rule,
                    count(self.trainable(path)),
                    count(self.extra_multiply_adds(path)),
                    note,
                )
            )
        table = format_table(
            ("adapted", "shape", "rule", "trained", "multiply-adds", "note"), rows, right=(3, 4)
        )
        extra = sum(self.extra_multiply_adds(path) for path in self.targets)
        share = self.trainable_params / max(self.base_params, 1)
        lines = [
            f"LoRA plan: rank {self.config.rank}, scale {self.config.scale:g}, "
            f"a {self.config.init}, b zero",
            table,
            f"trained {count(self.trainable_params)} beside {count(self.base_params)} frozen "
            f"parameters ({share:.1%}), {count(self.adapter_bytes)} bytes",
            f"forward {count(self.multiply_adds)} multiply-adds + {count(extra)} "
            f"({extra / max(self.multiply_adds, 1):.1%})",
        ]
        if self.skipped:
            reasons = list(self.skipped.items())
            lines += ["", format_table(("not adapted", "because"), reasons)]
        return "\n".join(lines)


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
        TargetError: A target or exclusion that matches nothing, one that matches what cannot be
            adapted, or a parameter that the function never uses; all of them at once, with the
            nearest paths.
        ConfigError: A rank that exceeds min(in, out) of every target.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"l1": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}
        >>> def model(params, x):
        ...     return x @ params["l1"]["kernel"] + params["l1"]["bias"]
        >>> print(plan(model, params, jnp.ones((2, 6)), config=LoraConfig(rank=2, alpha=4)))
        LoRA plan: rank 2, scale 2, a kaiming, b zero
        adapted    shape   rule        trained  multiply-adds  note
        l1/kernel  [6, 4]  all-linear       20             40
        trained 20 beside 28 frozen parameters (71.4%), 84 bytes
        forward 56 multiply-adds + 40 (71.4%)
        <BLANKLINE>
        not adapted  because
        l1/bias      used by add, not as a matrix
    """
    config = config or LoraConfig()
    uses = discover(fun, params, *args, **kwargs)
    leaves = {path: leaf for path, leaf in leaves_by_path(params).items() if path in uses}
    targets, skipped = _select(config, leaves, uses)
    largest = max(min(t.layout.fan_in, t.layout.fan_out) for t in targets.values())
    if config.rank > largest:
        raise ConfigError(
            f"expected a rank of at most {largest}, the largest min(in, out) of the adapted "
            f"weights, above which a rank only repeats itself; got rank={config.rank}"
        )
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
    unmatched = {rule for rule in config.targets if rule != ALL_LINEAR} | set(config.exclude)
    for path, leaf in leaves.items():
        matched = [r for r in config.targets if r != ALL_LINEAR and glob_matches(r, path)]
        excluded = [r for r in config.exclude if glob_matches(r, path)]
        unmatched -= {*matched, *excluded}
        layout, obstacle = _layout_of(leaf, uses[path])
        if excluded:
            skipped[path] = f"excluded by {excluded[0]}"
        elif layout is None and matched:
            problems.append(f"{path}: matched by {matched[0]!r} but {obstacle}")
        elif layout is None:
            skipped[path] = obstacle
        elif not matched and ALL_LINEAR in config.targets and not _is_linear(uses[path]):
            kinds = dict.fromkeys(MATRIX_USES.get(u.primitive, "") for u in uses[path])
            kind = " and ".join(k for k in kinds if k)
            skipped[path] = f"used as {kind}, and {ALL_LINEAR!r} adapts linear layers alone"
        elif matched or ALL_LINEAR in config.targets:
            rule = matched[0] if matched else ALL_LINEAR
            targets[path] = Target(path, layout, rule, uses[path])
        else:
            skipped[path] = "no target matches it"
    for rule in (*config.targets, *config.exclude):
        if rule in unmatched:
            problems.insert(0, f"{rule!r} matches no parameter ({near_misses(rule, leaves)})")
    if problems:
        raise TargetError(
            "expected every target and exclusion to match parameters that can be adapted; "
            "correct or exclude:\n  " + "\n  ".join(problems)
        )
    if not targets:
        left = "\n  ".join(f"{path}: {reason}" for path, reason in skipped.items())
        raise TargetError(f"expected at least one parameter to adapt, got none:\n  {left}")
    return targets, skipped


def _is_linear(uses: tuple[Use, ...]) -> bool:
    """Whether all uses as a matrix are those of a linear layer."""
    return {MATRIX_USES[u.primitive] for u in uses if u.primitive in MATRIX_USES} == {"linear"}


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


def param_key(key: jax.Array, path: str) -> jax.Array:
    """A PRNG key that depends on the parameter's path alone, not on which others there are."""
    digest = hashlib.sha256(path.encode()).digest()
    return jax.random.fold_in(key, int.from_bytes(digest[:4], "big"))


def init(key: jax.Array, params: Any, plan: Plan) -> Adapter:
    """A fresh adapter: ``a`` random, ``b`` zero, so that the adapted model is the base model.

    Each ``a`` is drawn from a key folded with its parameter's path: adding a layer to the model
    never changes the initialisation of another.

    Args:
        key: A JAX PRNG key.
        params: The parameters that the plan was made for; they are not changed.
        plan: The plan.

    Returns:
        The adapter, with ``a: [*stack, *in, r]`` and ``b: [*stack, r, *out]`` of
        ``plan.config.dtype`` and a float32 ``scale``.

    Raises:
        AdapterError: The parameters are not those of the plan.
    """
    config = plan.config
    leaves = leaves_by_path(params)
    entries: dict[str, LoraFactors] = {}
    problems = []
    for path, target in plan.targets.items():
        layout = target.layout
        if path not in leaves or tuple(leaves[path].shape) != layout.shape:
            found = tuple(leaves[path].shape) if path in leaves else near_misses(path, leaves)
            problems.append(f"{path}: expected shape {layout.shape}, found {found}")
            continue
        a = INITIALIZERS[config.init](param_key(key, path), layout, config.rank)
        entries[path] = LoraFactors(
            a=a.astype(config.dtype),
            b=jnp.zeros(layout.b_shape(config.rank), config.dtype),
            scale=jnp.asarray(config.scale, jnp.float32),
            layout=layout,
        )
    if problems:
        raise AdapterError("these are not the planned parameters:\n  " + "\n  ".join(problems))
    return Adapter(entries)
