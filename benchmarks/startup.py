"""What one waits for at the start: the imports, and the first training step.

Fresh processes take turns. A process imports one module and ends; or it imports a program of the
step benchmark, makes its model and its adapter, traces, compiles, and does the first step of a
small transformer. Nothing comes from a compilation cache. The time is that of the whole process,
the interpreter's start included.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import Options, Report, Row, Sample, say, table, take_turns
from benchmarks.machine import seconds
from benchmarks.peers import STEP_PROGRAMS
from benchmarks.transformer import Task
from benchmarks.workers import Local, Missing

ROOT = Path(__file__).resolve().parents[1]
IMPORT, FIRST_STEP = "import", "first step"
JAX, OURS, HAND = "jax", "jax_lora", "by hand"
#: What is imported, and by the programs that need it.
MODULES = (JAX, OURS, "flax.nnx", "qwix", "torch", "peft", "loralib")
#: How many times as long as that of JAX the import of jax_lora may take.
TARGET_IMPORT = 1.2
TASK = Task(width=256, depth=4, tokens=128)
QUICK = Task(width=64, depth=1, tokens=8, vocabulary=16, optimize=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartupOptions(Options):
    """Imports, and the time to the first step of a small transformer.

    Attributes:
        programs: Whose first step.
    """

    programs: tuple[str, ...] = tuple(n for n in STEP_PROGRAMS if "compile" not in n)


DEFAULTS = StartupOptions()


def first_step(program: str, task: Task) -> None:
    """Build the program, and do one step."""
    subject = Local(f"benchmarks.peers.{STEP_PROGRAMS[program]}:subject", task)
    subject.call("build")
    subject.call("step")


def timed(code: str) -> Sample:
    """The wall time of a process that runs some Python.

    Raises:
        Missing: A package that it needs is not installed.
        RuntimeError: It failed.
    """

    def run() -> None:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            *_, last = ["", *done.stderr.splitlines()]
            if "Missing: " in last:
                raise Missing(last.partition("Missing: ")[2])
            raise RuntimeError(f"{code}: expected exit status 0, got:\n{done.stderr}")

    return {"seconds": seconds(run)}


def run(options: StartupOptions, quick: bool) -> Report:
    """Checks what there is to measure, then lets it take turns."""
    rows: list[Row] = []
    codes: dict[str, dict[str, str]] = {IMPORT: {}, FIRST_STEP: {}}
    for module in MODULES:
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            why = f"needs {module}: pip install -e '.[bench]'"
            rows.append(Row(IMPORT, module, skipped=why))
        else:
            codes[IMPORT][module] = f"import {module}"
    for program in options.programs:
        code = f"from benchmarks.startup import *; first_step({program!r}, TASK)"
        try:
            if not quick:
                timed(code)  # also compiles the bytecode
            elif program == OURS:  # the others' steps are checked by the step benchmark
                first_step(program, QUICK)
            codes[FIRST_STEP][program] = code
        except Missing as missing:
            rows.append(Row(FIRST_STEP, program, skipped=str(missing)))
    for case, of_case in codes.items():
        turns: dict[str, Callable[[], Sample]] = {
            name: functools.partial(timed, code) for name, code in of_case.items()
        }
        samples = take_turns(turns, 0 if quick else options.repeats, warm_up=0)
        rows += [Row(case, name, samples[name]) for name in turns]
        say(f"startup: {case}: {', '.join(turns)}")
    return Report(rows, {"target_import": TARGET_IMPORT})


def tables(report: Report) -> dict[str, str]:
    """The times, and how they compare."""
    found = {}
    for case, compared in ((IMPORT, JAX), (FIRST_STEP, OURS)):
        lines = []
        for row in (row for row in report.rows if row.case == case):
            if row.skipped:
                lines.append([row.program, row.skipped, ""])
                continue
            ratio = str(report.ratio(case, row.program, compared, "seconds"))
            same = row.program == compared
            lines.append([row.program, f"{row.median('seconds'):.2f} s", "" if same else ratio])
        heads = [case, "seconds", f"this / {compared}"]
        found[f"startup {case}"] = table(heads, lines)
    return found
