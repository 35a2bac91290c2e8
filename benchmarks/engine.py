"""What `jl.apply` costs: beside the plain model, and beside LoRA written into the model by hand.

Each model is one plain JAX function, and three programs are its gradient:

* `plain`: with respect to all of the model's parameters, without LoRA.
* `by hand`: with respect to the factors, of the model with ``x W + s (x a) b`` written out.
* `jax_lora`: with respect to the adapter, of ``jl.apply`` on the plain function. That includes the
  gradient of each `scale`, which the program by hand has as a constant.

The last two must agree: the loss, and the gradient of every factor. Then each program is built from
nothing, and the two with LoRA are run.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_lora as jl
from benchmarks.compiled import JaxSubject, Program
from benchmarks.harness import Options, Report, Row, Spread, agree, say, table, take_turns
from benchmarks.models import MODELS, Draw, Factored, Model
from benchmarks.workers import Crew
from jax_lora.adapter import path_of

PLAIN, HAND, OURS = "plain", "by hand", "jax_lora"
SCALE = 0.5
TOLERANCE = 1e-4
#: Ratios that we mean to stay within: what is compared, and over what.
TARGETS = {"build, jax_lora / plain": 1.25, "run, jax_lora / by hand": 1.05}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions(Options):
    """A gradient through `apply`, on several kinds of model.

    Attributes:
        models: Which models.
        builds: How often each program is built.
        repeats: How many turns each program takes.
    """

    models: tuple[str, ...] = tuple(MODELS)
    builds: int = 9
    repeats: int = 25


DEFAULTS = EngineOptions()


def make_adapter(model: Model) -> jl.Adapter:
    """An adapter for every kernel, with a random ``b``: at zero, ``a`` would have no gradient."""
    config = jl.LoraConfig(model.rank, SCALE, "**/kernel", scaling="alpha")
    plan = jl.plan(model.loss, model.params, *model.batch, config=config)
    fresh = jax.eval_shape(lambda: jl.init(jax.random.key(0), model.params, plan))
    draw = Draw()
    return jl.Adapter(
        {
            path: jl.LoraFactors(
                draw.normal(*f.a.shape, deviation=f.layout.fan_in**-0.5),
                draw.normal(*f.b.shape, deviation=0.3),
                jnp.float32(SCALE),
                f.layout,
            )
            for path, f in fresh.items()
        }
    )


def subject(kind: str, name: str, quick: bool) -> JaxSubject:
    """One of the three programs on one of the models."""
    model = MODELS[name](quick)
    return JaxSubject(program(kind, model, make_adapter(model)), optimize=not quick)


def program(kind: str, model: Model, adapter: jl.Adapter) -> Program:
    """One of the three programs."""
    pairs = {path: (adapter[path].a, adapter[path].b) for path in adapter}

    def plain() -> Any:
        return lambda params, _, *batch: model.loss(params, *batch)

    def by_hand() -> Any:
        def loss(pairs: Any, params: Any, *batch: Any) -> jax.Array:
            def with_factors(key_path: Any, w: jax.Array) -> Any:
                path = path_of(key_path)
                if path not in pairs:
                    return w
                a, b = pairs[path]
                return Factored(w, a, b, scale=SCALE)

            return model.loss(jax.tree_util.tree_map_with_path(with_factors, params), *batch)

        return loss

    def with_apply() -> Any:
        # A new function for each: what one run caches by the function, no other finds.
        adapted = jl.apply(lambda params, *batch: model.loss(params, *batch))
        return lambda adapter, params, *batch: adapted(params, adapter, *batch)

    def arrays_of(tree: Any) -> dict[str, np.ndarray]:
        if kind == OURS:
            tree = {path: (entry.a, entry.b) for path, entry in tree.items()}
        return {f"{path} {ab}": pair[k] for path, pair in tree.items() for k, ab in enumerate("ab")}

    losses = {PLAIN: plain, HAND: by_hand, OURS: with_apply}
    trained = {PLAIN: model.params, HAND: pairs, OURS: adapter}
    frozen = None if kind == PLAIN else model.params
    return Program(losses[kind], trained[kind], frozen, model.batch, arrays_of)


def measure(name: str, options: EngineOptions, quick: bool) -> list[Row]:
    """Checks and measures one model."""
    factories = {
        kind: ("benchmarks.engine:subject", kind, name, quick) for kind in (PLAIN, HAND, OURS)
    }
    with Crew(factories, local=quick) as crew:
        adapted = {kind: crew.subjects[kind] for kind in (HAND, OURS)}
        for one in adapted.values():
            one.call("build")
        results = {kind: one.call("results", 1) for kind, one in adapted.items()}
        differences = agree(results, HAND, TOLERANCE)
        case = MODELS[name](quick).what
        say(f"{name}: {case}: differs by {differences[OURS]:.1e}")
        samples: dict[str, Any] = {kind: {} for kind in crew.subjects}
        counts: dict[str, Any] = {kind: one.call("counts") for kind, one in adapted.items()}
        if not quick:
            builds = take_turns(crew.turns("build"), options.builds)
            turns = crew.turns("step")
            steps = take_turns({kind: turns[kind] for kind in adapted}, options.repeats)
            samples = {kind: builds[kind] | steps.get(kind, {}) for kind in samples}
            counts = crew.ask("counts")
    return [
        Row(case, kind, samples[kind], counts.get(kind, {}), differences.get(kind))
        for kind in (PLAIN, HAND, OURS)
    ]


def run(options: EngineOptions, quick: bool) -> Report:
    """Checks and measures all models."""
    rows = [row for name in options.models for row in measure(name, options, quick)]
    return Report(rows, {"tolerance": TOLERANCE, "targets": TARGETS})


def compared(report: Report, case: str) -> dict[str, Spread]:
    """The ratios of a model: what the targets are about, and some more."""
    return {
        "build, jax_lora / plain": report.ratio(case, OURS, PLAIN, "build_s"),
        "that in CPU time": report.ratio(case, OURS, PLAIN, "build_cpu_s"),
        "build, by hand / plain": report.ratio(case, HAND, PLAIN, "build_s"),
        "run, jax_lora / by hand": report.ratio(case, OURS, HAND, "step_s"),
    }


def tables(report: Report) -> dict[str, str]:
    """The ratios of each model, and what they are made of."""
    cases = report.cases()
    heads = ["model", *compared(report, cases[0])]
    ratios = table(heads, [[case, *map(str, compared(report, case).values())] for case in cases])
    heads = ["model", "program", "trace, ms", "lower, ms", "compile, ms", "run, ms"]
    heads += ["StableHLO lines", "products", "temporary memory, MB"]
    lines = []
    for row in report.rows:
        times = [f"{1e3 * row.median(f'{stage}_s'):.0f}" for stage in ("trace", "lower", "compile")]
        run = f"{1e3 * row.median('step_s'):.1f}" if "step_s" in row.samples else ""
        counted = [f"{row.counts[name]:.0f}" for name in ("stablehlo_lines", "dot_generals")]
        memory = f"{row.counts['temp_bytes'] / 1e6:.1f}"
        lines.append([row.case, row.program, *times, run, *counted, memory])
    return {"engine": ratios, "engine details": table(heads, lines)}
