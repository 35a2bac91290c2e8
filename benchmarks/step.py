"""One LoRA training step of a transformer, beside every other way to do it.

All programs train the same factors of the same weights on the same tokens with Adam, and must
agree on the losses of the first steps and on where they take the factors. Then JAX programs are
built from nothing (traced, lowered, compiled), and all of them run, each in a process of its own,
in turns.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from benchmarks.harness import Options, Report, Row, Samples, agree, say, table, take_turns
from benchmarks.peers import STEP_PROGRAMS
from benchmarks.transformer import Task
from benchmarks.workers import Crew

OURS, HAND = "jax_lora", "by hand"
#: Which of ours another program is compared with: the one on the same model.
COUNTERPARTS = {"qwix on linen": "jax_lora on linen"} | dict.fromkeys(
    ("qwix on NNX", "nnx.LoRA"), "jax_lora on NNX"
)
#: Adam turns a gradient of nearly nothing into a whole step, so rounding shows a little.
TOLERANCE = 1e-3
CHECKED_STEPS = 3
#: A turn lasts at least so long.
TURN_S = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions(Options):
    """One LoRA step of a transformer of 8 layers.

    Attributes:
        width: Widths of the model; by default a few cases, not all combinations.
        tokens: Lengths of the sequence.
        rank: Ranks of the adapters.
        layers: Stacked and scanned, or a Python loop.
        batch: Sequences in a step.
        dtype: Of weights and activations.
        programs: Which programs; by default all, PEFT through torch.compile only if it is named.
        builds: How often JAX programs are built.
    """

    width: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    rank: tuple[int, ...] = ()
    layers: tuple[Literal["scanned", "unrolled"], ...] = ()
    batch: int = 1
    dtype: str = "float32"
    programs: tuple[str, ...] = tuple(n for n in STEP_PROGRAMS if "compile" not in n)
    builds: int = 3


DEFAULTS = StepOptions()


def tasks_of(options: StepOptions, quick: bool) -> list[Task]:
    """The cases: all combinations of what is named, or the default ones."""
    if quick:
        small = Task(width=64, depth=2, tokens=12, batch=2, rank=4, vocabulary=32, optimize=False)
        return [dataclasses.replace(small, scanned=scanned) for scanned in (True, False)]
    plain = Task(batch=options.batch, dtype=options.dtype)
    if not (options.width or options.tokens or options.rank or options.layers):
        changes: list[dict[str, Any]] = [{"tokens": 64}, {}, {"scanned": False}]
        changes += [{"rank": 64}, {"width": 1024}]
        return [dataclasses.replace(plain, **change) for change in changes]
    return [
        dataclasses.replace(
            plain, width=width, tokens=tokens, rank=rank, scanned=layers == "scanned"
        )
        for width in options.width or (512,)
        for layers in options.layers or ("scanned",)
        for tokens in options.tokens or (512,)
        for rank in options.rank or (8,)
    ]


def measure(task: Task, options: StepOptions, quick: bool) -> list[Row]:
    """Checks and measures one case."""
    programs = options.programs
    if quick and not task.scanned:  # it takes as long again, and the check comes with every timing
        programs = tuple(name for name in programs if name in (OURS, HAND))
    modules = {name: f"benchmarks.peers.{STEP_PROGRAMS[name]}" for name in programs}
    factories = {name: (f"{module}:subject", task) for name, module in modules.items()}
    with Crew(factories, local=quick) as crew:
        crew.ask("build")
        differences = agree(crew.ask("results", CHECKED_STEPS), HAND, TOLERANCE)
        say(f"{task}: " + ", ".join(f"{n} {d:.0e}" for n, d in differences.items()))
        samples: dict[str, Samples] = {name: {} for name in crew.subjects}
        counts = {name: dict(c) for name, c in crew.ask("counts").items()}
        if not quick:
            builds = take_turns(crew.turns("build"), options.builds, warm_up=0)
            slowest = max(s["step_s"] for s in crew.ask("step").values())
            count = max(1, math.ceil(TURN_S / slowest))
            steps = take_turns(crew.turns("step", count), options.repeats)
            samples = {name: builds[name] | steps[name] for name in samples}
            for name, memory in crew.ask("memory").items():
                counts[name] |= memory
    work = {"tokens": float(task.batch * task.tokens), "model_flops": float(task.flops)}
    rows = {
        name: Row(str(task), name, samples[name], work | counts[name], differences[name])
        for name in crew.subjects
    }
    skipped = {name: Row(str(task), name, skipped=why) for name, why in crew.missing.items()}
    return [(rows | skipped)[name] for name in programs]


def run(options: StepOptions, quick: bool) -> Report:
    """Checks and measures all cases."""
    if HAND not in options.programs:
        raise SystemExit(f"expected {HAND!r} among the programs: the others are compared with it")
    rows = [row for task in tasks_of(options, quick) for row in measure(task, options, quick)]
    return Report(rows, {"tolerance": TOLERANCE, "rates": {} if quick else rates(options.dtype)})


def rates(dtype: str) -> dict[str, float]:
    """What the machine can do: the best of JAX and PyTorch, of some products and sums."""
    found: dict[str, float] = {}
    probes = {name: (f"benchmarks.machine:{name}Probe",) for name in ("Jax", "Torch")}
    with Crew(probes) as crew:
        for probe in crew.subjects.values():
            for name, rate in probe.call("rates", dtype, 2048, 5).items():
                found[name] = max(rate, found.get(name, 0.0))
    return found


def tables(report: Report) -> dict[str, str]:
    """How many times as long as ours a program's step takes; and for each case all of it."""
    cases = report.cases()
    details = "\n\n".join(f"{case}:\n\n{case_table(report, case)}" for case in cases)
    heads = ["step, this / ours", "compared with", *cases]
    lines = [
        [program, counterpart(program), *(compared(report, case, program) for case in cases)]
        for program in dict.fromkeys(row.program for row in report.rows)
        if program != counterpart(program)
    ]
    return {"step": table(heads, lines), "step details": details}


def counterpart(program: str) -> str:
    """Which of ours a program is compared with."""
    return COUNTERPARTS.get(program, OURS)


def compared(report: Report, case: str, program: str) -> str:
    """The ratio of a program's steps and ours, or why there is none."""
    rows = {row.program: row for row in report.rows if row.case == case}
    ours = rows.get(counterpart(program))
    if ours is None:
        return rows[program].skipped
    reason = rows[program].skipped or ours.skipped
    return reason or str(report.ratio(case, program, ours.program, "step_s"))


def case_table(report: Report, case: str) -> str:
    """One case, a line for each program."""
    heads = ["program", "step, ms", "this / ours", "tokens/s", "of the matmul rate"]
    heads += ["trace, s", "lower + compile, s", "program's memory", "process, peak"]
    rate = report.facts["rates"]["flops_per_s"]
    lines = []
    for row in (r for r in report.rows if r.case == case):
        if row.skipped:
            lines.append([row.program, row.skipped, *[""] * (len(heads) - 2)])
            continue
        step = row.median("step_s")
        ratio = "" if row.program == OURS else compared(report, case, row.program)
        build = ["", ""]
        if "trace_s" in row.samples:
            built = row.median("lower_s") + row.median("compile_s")
            build = [f"{row.median('trace_s'):.2f}", f"{built:.2f}"]
        memory = row.counts.get("peak_bytes")
        lines.append(
            [
                row.program,
                f"{1e3 * step:.1f}",
                ratio,
                f"{row.counts['tokens'] / step:,.0f}",
                f"{row.counts['model_flops'] / step / rate:.0%}",
                *build,
                "" if memory is None else megabytes(memory),
                megabytes(row.counts.get("peak_rss_bytes", math.nan)),
            ]
        )
    return table(heads, lines)


def megabytes(size: float) -> str:
    """A number of bytes, in words."""
    return "" if math.isnan(size) else f"{size / 1e6:,.0f} MB"
