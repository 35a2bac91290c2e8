"""Interpret a jaxpr over values of which some are virtual weights.

Equations that touch no virtual weight run, in maximal runs, through JAX's own evaluator. The others
go to the rule of their primitive, found by *name*: a rule either keeps the weight factored or
declines, and a declined equation runs on the materialised weight. This file holds the only use of
JAX's jaxpr data structures that the rules share.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core

from jax_lora.errors import MaterializeError
from jax_lora.interpreter.cost import Product, verdict
from jax_lora.interpreter.mixed import picked
from jax_lora.virtual import LoraWeight, Selected


class Unfactorable(Exception):  # noqa: N818 - a signal from a rule, not an error for the user
    """Raised by a rule that cannot keep this use of the weight factored."""


@dataclasses.dataclass(frozen=True)
class Event:
    """What happened to a weight where it met a primitive that consumes it.

    Attributes:
        path: The parameter's path.
        primitive: The primitive's name.
        factored: Whether it stayed ``x W + scale (x a) b``; if not, ``W + scale a b`` was formed.
        decided: What the mode ``"auto"`` found, or the mode that was asked for; empty if there was
            nothing to decide.
    """

    path: str
    primitive: str
    factored: bool
    decided: str = ""


#: Primitives that call the one jaxpr in their parameters with their inputs.
CALLS = frozenset(
    {
        *("jit", "pjit", "remat", "remat2", "checkpoint", "closed_call", "core_call", "call"),
        *("core_closed_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
    }
)

Rule = Callable[["Interpreter", Any, list[Any]], Sequence[Any]]

#: ``rule(interpreter, eqn, values) -> outputs`` of each primitive, by the primitive's name.
RULES: dict[str, Rule] = {}


#: The primitives whose rules take factors that are selected out of a bank as they are. For all
#: others the factors are picked first, so that nothing is done to those of every slot.
TAKE_SELECTED: set[str] = set()


def rule(*names: str, takes_selected: bool = False) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule of the primitives with these names.

    Args:
        *names: The primitives' names.
        takes_selected: Whether it leaves the factors alone, or knows those out of a bank.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"primitive {name!r} already has a rule")
            RULES[name] = function
            if takes_selected:
                TAKE_SELECTED.add(name)
        return function

    return register


def is_literal(atom: Any) -> bool:
    """Whether a jaxpr atom is a literal (it carries its value) and not a variable."""
    return hasattr(atom, "val")


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The jaxpr and its constants, of a closed or an open one."""
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else (jaxpr, ())


@functools.cache
def _empty_jaxpr() -> Any:
    return jax.make_jaxpr(lambda: ())().jaxpr


def evaluate(eqns: Sequence[Any], env: dict[Any, Any], outvars: Sequence[Any]) -> list[Any]:
    """Run equations whose inputs are in ``env`` through JAX's own evaluator."""
    made: set[Any] = set()
    invars: dict[Any, None] = {}
    effects: set[Any] = set()
    for eqn in eqns:
        for atom in eqn.invars:
            if not is_literal(atom) and atom not in made:
                invars[atom] = None
        made.update(eqn.outvars)
        effects |= set(eqn.effects)
    part = _empty_jaxpr().replace(
        invars=list(invars), outvars=list(outvars), eqns=list(eqns), effects=effects
    )
    return list(jax.core.eval_jaxpr(part, (), *[env[v] for v in invars]))


def evaluate_one(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Run one equation on other input values, through JAX's own evaluator.

    Raises:
        Unfactorable: The equation reads one variable twice and the two values differ.
    """
    env: dict[Any, Any] = {}
    for atom, value in zip(eqn.invars, values, strict=True):
        if is_literal(atom):
            continue
        if env.setdefault(atom, value) is not value:
            raise Unfactorable
    return evaluate([eqn], env, eqn.outvars)


class Interpreter:
    """Evaluates jaxprs whose inputs may be `LoraWeight` values.

    Attributes:
        strict: Refuse to materialise a weight that could not stay factored.
        modes: By path, whether a product keeps the weight factored, forms it, or decides; what is
            not named keeps it factored.
        tokens: Where each token selects factors of its own, the `TokenAxes` of the function.
        events: What became of each weight at each primitive that consumed it, in trace order.
    """

    def __init__(
        self,
        *,
        strict: bool = False,
        modes: Mapping[str, str] | None = None,
        tokens: Any = None,
    ):
        self.strict = strict
        self.modes = modes or {}
        self.tokens = tokens
        self.events: list[Event] = []
        self._uses: collections.Counter[str] = collections.Counter()
        self._verdict = ""
        self._jits: dict[Any, tuple[Any, Any]] = {}

    def factored(self, weight: LoraWeight, eqn: Any) -> None:
        """Record that a rule kept ``weight`` factored at ``eqn``."""
        decided = self._verdict if self.modes.get(weight.path) == "auto" else ""
        self.events.append(Event(weight.path, eqn.primitive.name, factored=True, decided=decided))

    def formed(
        self, weight: LoraWeight, eqn: Any, values: list[Any], product: Product | None = None
    ) -> list[Any] | None:
        """The equation's outputs on the formed weight, if its mode says so; else None.

        Args:
            weight: The weight.
            eqn: A product that a rule could keep factored.
            values: The equation's inputs, the weight among them.
            product: The product's sizes; without them ``"auto"`` keeps the weight factored.
        """
        mode = self.modes.get(weight.path, "factored")
        form, self._verdict = mode == "materialize", "materialize"
        if mode == "auto":
            form, self._verdict = (False, "factored") if product is None else verdict(product)
            form = form and weight.drop is None
        if not form:
            return None
        if weight.drop is not None:
            self._refuse_dropout(weight, eqn.primitive.name)
        event = Event(weight.path, eqn.primitive.name, factored=False, decided=self._verdict)
        self.events.append(event)

        # Formed again for the backward pass: as a residual it would be a copy of W for each layer.
        @jax.checkpoint
        def on_formed(values: list[Any]) -> list[Any]:
            formed = [v.materialize() if isinstance(v, LoraWeight) else v for v in values]
            return evaluate_one(eqn, formed)

        return on_formed(values)

    def dropped(self, x: Any, weight: LoraWeight) -> Any:
        """The input of a weight's update, with dropout if it has one: another mask at each use."""
        if weight.drop is None:
            return x
        self._uses[weight.path] += 1
        return weight.drop(x, self._uses[weight.path])

    def updated(
        self,
        to_rank: Callable[[jax.Array, jax.Array], jax.Array],
        x: jax.Array,
        factor: jax.Array,
        from_rank: Callable[[jax.Array], jax.Array],
    ) -> jax.Array:
        """The update of a product, through the rank: ``from_rank(to_rank(x, factor))``.

        A method, because other things than the update can be made of the same two halves: see
        `jax_lora.from_data`.

        Args:
            to_rank: ``x, a -> x a``, linear in both.
            x: The input of the update.
            factor: The factor that meets it.
            from_rank: ``h -> scale * h b``.
        """
        return from_rank(to_rank(x, factor))

    def materialize(self, value: Any, primitive: str) -> Any:
        """The value as an ordinary array; an already ordinary value is returned as it is.

        Raises:
            MaterializeError: The value is a virtual weight and the interpreter is strict, or it
                has dropout, which acts on the input of a factored product.
        """
        if not isinstance(value, LoraWeight):
            return value
        if value.drop is not None:
            self._refuse_dropout(value, primitive)
        if self.strict:
            raise MaterializeError(
                f"{value.path}: the adapted weight reaches `{primitive}` with shape {value.shape}; "
                "expected a primitive with a factored rule. Exclude this parameter from the "
                "adapter, or drop strict=True to form W + scale*a*b at this place"
            )
        value = self.picked(value, primitive)
        self.events.append(Event(value.path, primitive, factored=False))
        return value.materialize()

    def picked(self, value: Any, primitive: str) -> Any:
        """A value whose factors are not selected out of a bank any more, but this example's own.

        Raises:
            MaterializeError: Each token selects factors of its own.
        """
        if not isinstance(value, LoraWeight) or not value.selects:
            return value
        if value.scale.ndim:
            raise MaterializeError(
                f"{value.path}: the adapted weight reaches `{primitive}`; with an id for each "
                "token, expected a matrix product or a lookup of rows, in which every row is one "
                "token's. Give one id for each example, or leave this parameter out of the bank"
            )
        a, b = (f if not isinstance(f, Selected) else picked(f) for f in (value.a, value.b))
        return dataclasses.replace(value, a=a, b=b)

    def _refuse_dropout(self, weight: LoraWeight, primitive: str) -> None:
        raise MaterializeError(
            f"{weight.path}: the adapted weight reaches `{primitive}`, where W + scale*a*b is "
            "formed; expected a factored product, whose input dropout can act on. Give this "
            "parameter dropout 0 or the mode 'factored', or exclude it from the adapter"
        )

    def jit(self, closed_jaxpr: Any, name: str, treedef: Any, build: Callable[[], Any]) -> Any:
        """One compiled function per inner jaxpr, so that a function called twice is traced once."""
        # Dropout has another mask at each use, so what has been used so far matters to it.
        key = (id(closed_jaxpr), treedef, frozenset(self._uses.items()))
        if key not in self._jits:
            # The jaxpr is kept alive beside the function: an id may be reused after collection.
            function = build()
            function.__name__ = function.__qualname__ = name
            self._jits[key] = (jax.jit(function), closed_jaxpr)
        return self._jits[key][0]

    def apply_rule(self, eqn: Any, values: list[Any]) -> list[Any]:
        """The outputs of an equation of whose inputs at least one is virtual."""
        name = eqn.primitive.name
        found = RULES.get(name)
        if name not in TAKE_SELECTED:
            values = [self.picked(value, name) for value in values]
        if found is not None:
            try:
                # The mesh, and what else was in force where the equation was traced.
                with eqn.ctx.manager:
                    return list(found(self, eqn, values))
            except Unfactorable:
                pass
        plain: dict[int, Any] = {}
        for value in values:
            if id(value) not in plain:
                plain[id(value)] = self.materialize(value, name)
        return evaluate_one(eqn, [plain[id(value)] for value in values])

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """Evaluate a jaxpr; outputs may be virtual weights."""
        env: dict[Any, Any] = dict(
            zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True)
        )
        last_use = {v: len(jaxpr.eqns) for v in jaxpr.outvars if not is_literal(v)}
        for index, eqn in reversed(list(enumerate(jaxpr.eqns))):
            for atom in eqn.invars:
                if not is_literal(atom):
                    last_use.setdefault(atom, index)

        pending: list[Any] = []

        def flush(upto: int) -> None:
            outvars = [v for eqn in pending for v in eqn.outvars if last_use.get(v, -1) >= upto]
            if pending:
                results = evaluate(pending, env, outvars)
                env.update(zip(outvars, results, strict=True))
                pending.clear()

        for index, eqn in enumerate(jaxpr.eqns):
            touched = any(
                isinstance(env.get(v), LoraWeight) for v in eqn.invars if not is_literal(v)
            )
            if not touched:
                pending.append(eqn)
                continue
            flush(index)
            values = [v.val if is_literal(v) else env[v] for v in eqn.invars]
            env.update(zip(eqn.outvars, self.apply_rule(eqn, values), strict=True))
        flush(len(jaxpr.eqns))
        return [v.val if is_literal(v) else env[v] for v in jaxpr.outvars]
