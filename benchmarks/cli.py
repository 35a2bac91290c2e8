"""The command line: which benchmarks there are, and what is done with what they find."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks import adapters, article, checkpoints, engine, harness, peft_load, startup, step
from benchmarks.harness import Report
from benchmarks.machine import PEERS
from benchmarks.workers import Crew
from jax_lora.experiments.environment import versions

#: The module of each benchmark, with ``DEFAULTS``, ``run(options, quick)`` and ``tables(report)``.
BENCHMARKS: dict[str, Any] = {
    "article": article,
    "step": step,
    "engine": engine,
    "adapters": adapters,
    "startup": startup,
    "checkpoints": checkpoints,
    "peft_load": peft_load,
}
RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Measure jax_lora beside what one would use instead.

    Attributes:
        names: Which benchmarks; by default all.
        quick: Tiny, and only check that the programs agree: nothing is timed.
        repeats: How many turns each program takes; by default what each benchmark says.
        out: A folder for the results, as JSON and plots; what is there is replaced.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = tuple(BENCHMARKS)
    quick: bool = False
    repeats: int | None = None
    out: Path | None = None


def command_line() -> type[Command]:
    """`Command` with the names to choose from, and with the options of each benchmark."""
    names: Any = tuple[Literal[*BENCHMARKS], ...]  # type: ignore[valid-type]
    positional = (("names", Annotated[names, tyro.conf.Positional], tuple(BENCHMARKS)),)
    options = ((name, type(one.DEFAULTS), one.DEFAULTS) for name, one in BENCHMARKS.items())
    return dataclasses.make_dataclass(
        "Benchmarks",
        [*positional, *options],
        bases=(Command,),
        namespace={"__doc__": Command.__doc__},
        frozen=True,
        kw_only=True,
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Report]:
    """Runs what is asked for, prints its tables, and returns what was found.

    Raises:
        SystemExit: Programs that should compute the same do not.
    """
    command: Any = tyro.cli(command_line(), args=argv)
    return {name: run(name, command, getattr(command, name)) for name in command.names}


def run(name: str, command: Command, options: harness.Options) -> Report:
    """Runs one benchmark."""
    module = BENCHMARKS[name]
    if command.repeats is not None:
        options = dataclasses.replace(options, repeats=command.repeats)
    before = harness.load_average()
    try:
        report: Report = module.run(options, command.quick)
    except harness.Disagreement as error:
        raise SystemExit(f"{name}: {error}") from error
    for row in report.rows:
        if row.skipped:
            harness.say(f"{name}: {row.program}: {row.skipped}")
    if command.quick:
        harness.say(f"{name}: the programs agree; nothing was timed")
        return report
    with Crew({"jax": ("benchmarks.machine:JaxProbe",)}) as crew:
        hardware = crew.subjects["jax"].call("hardware")
    load = {"load_before": before, "load_after": harness.load_average()}
    report = dataclasses.replace(
        report,
        benchmark=name,
        settings=dataclasses.asdict(options),
        machine=hardware | load,
        versions=versions(*PEERS),
    )
    print("\n\n".join([report.about(), *module.tables(report).values()]))
    if command.out is not None:
        report.save(command.out / f"{name}-{hardware['platform']}.json")
        if hasattr(module, "plot"):
            module.plot(report, command.out / f"{name}-{hardware['platform']}.png")
        harness.say(f"{name}: saved in {command.out}")
    return report
