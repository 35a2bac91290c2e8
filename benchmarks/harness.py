"""Turns, ratios and results: what every benchmark is made of. Imports neither JAX nor PyTorch.

A benchmark is a module with its options (``DEFAULTS``) and the functions ``run(options, quick) ->
Report`` and ``tables(report) -> {name: Markdown}``. It makes its *programs*, checks that they
compute the same (`agree`), lets them take turns (`take_turns`), and puts what came out into rows.
With ``quick`` it is tiny and only checks: nothing is timed.

Programs take turns so that a busy moment of the machine does not fall on one of them alone, and
what is compared are ratios of single turns: their median, beside their quartiles.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

#: What one turn of a program measured, by quantity: seconds, mostly.
Sample = Mapping[str, float]
#: The values of all turns, by quantity.
Samples = dict[str, list[float]]
#: What a program computed, float64 by name, to be compared with the others'.
Values = Mapping[str, np.ndarray]


class Disagreement(Exception):  # noqa: N818 - what happened, not an error of ours
    """Two programs that should compute the same do not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What all benchmarks share.

    Attributes:
        repeats: How many turns each program takes.
    """

    repeats: int = 7


@dataclasses.dataclass(frozen=True)
class Spread:
    """The median of a list, and its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of some values."""
        low, median, high = (float(q) for q in np.quantile(values, [0.25, 0.5, 0.75]))
        return cls(median, low, high)

    def __str__(self) -> str:
        if self.low == self.high:  # of a single turn
            return f"{self.median:.2f}"
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclasses.dataclass(frozen=True)
class Row:
    """One program in one case.

    Attributes:
        case: What all programs of the case did, in words.
        program: Whose program it is.
        samples: By quantity, its value in every turn.
        counts: What was counted and not timed: FLOPs, bytes, accuracies.
        difference: The largest relative difference of its results from the reference's; None for
            the reference itself, and where nothing was compared.
        skipped: Why it did not run, and what to install; empty if it did.
    """

    case: str
    program: str
    samples: Samples = dataclasses.field(default_factory=dict)
    counts: dict[str, float] = dataclasses.field(default_factory=dict)
    difference: float | None = None
    skipped: str = ""

    def median(self, quantity: str) -> float:
        """The median over the turns."""
        return float(np.median(self.samples[quantity]))


@dataclasses.dataclass(frozen=True)
class Report:
    """All that a benchmark found, as it is written to JSON.

    Attributes:
        rows: One for each program in each case.
        facts: What belongs to no program: measured rates, tolerances, targets.
        benchmark: Its name.
        settings: Its options.
        machine: What it ran on, with the load before and after.
        versions: Of Python and of the packages that compute.
        note: What else to know of how it was measured.
    """

    rows: list[Row]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    benchmark: str = ""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    note: str = ""

    def cases(self) -> list[str]:
        """The cases, in their order."""
        return list(dict.fromkeys(row.case for row in self.rows))

    def row(self, case: str, program: str) -> Row:
        """The row of a program in a case."""
        return next(row for row in self.rows if (row.case, row.program) == (case, program))

    def ran(self, case: str) -> list[Row]:
        """The rows of a case that were measured."""
        return [row for row in self.rows if row.case == case and not row.skipped]

    def ratio(self, case: str, over: str, under: str, quantity: str) -> Spread:
        """The ratios of single turns of two programs."""
        return ratios(
            self.row(case, over).samples[quantity], self.row(case, under).samples[quantity]
        )

    def about(self) -> str:
        """What was run, and on what."""
        machine, usable = self.machine, self.machine["usable_cores"]
        where = f"{machine['cpu']}, {usable} cores"
        if machine["platform"] != "cpu":
            where = f"{machine['devices']} x {machine['device']}; {where}"
        where += f", with a load of {machine['load_before']} before it"
        said = f"`python -m benchmarks {self.benchmark}`, {where}; JAX {self.versions['jax']}"
        return f"{said}; {self.note}" if self.note else said

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        found = json.dumps(dataclasses.asdict(self), indent=1, default=str)
        path.write_text(found + "\n")

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what `save` wrote."""
        saved = json.loads(path.read_text())
        return cls(**saved | {"rows": [Row(**row) for row in saved["rows"]]})


def ratios(over: Sequence[float], under: Sequence[float]) -> Spread:
    """The ratios of single turns."""
    return Spread.of([a / b for a, b in zip(over, under, strict=True)])


def take_turns(
    programs: Mapping[str, Callable[[], Sample]],
    repeats: int,
    *,
    warm_up: int = 1,
    rotate: bool = True,
) -> dict[str, Samples]:
    """Run every program ``repeats`` times, in turn.

    Args:
        programs: What to run, by name; each returns what it measured of itself.
        repeats: How often.
        warm_up: How many rounds come first and are not counted.
        rotate: Each round starts with the next program; otherwise all have the same order.

    Returns:
        By name and quantity, the values of all counted turns.
    """
    samples: dict[str, Samples] = {name: {} for name in programs}
    names = list(programs)
    for turn in range(-warm_up, repeats):
        first = turn % max(len(names), 1) if rotate else 0
        for name in names[first:] + names[:first]:
            measured = programs[name]()
            if turn >= 0:
                for quantity, value in measured.items():
                    samples[name].setdefault(quantity, []).append(value)
    return samples


def agree(results: Mapping[str, Values], reference: str, tolerance: float) -> dict[str, float]:
    """Check that all programs computed what the reference did.

    The difference of two arrays is ``|x - y| / |y|`` in the Euclidean norm, ``y`` the reference's.

    Args:
        results: By program, what it computed.
        reference: The program that the others are compared with.
        tolerance: The largest difference that passes.

    Returns:
        By program, its largest difference.

    Raises:
        Disagreement: Names every array of every program that differs by more, or is missing, and
            those of the reference that are nothing but zeros.
    """
    wrong, largest = [], {}
    for program, values in results.items():
        differences = {}
        for name, expected in results[reference].items():
            found = values.get(name)
            if found is None or found.shape != expected.shape:
                shape = None if found is None else found.shape
                wrong.append(f"{program}: {name}: expected shape {expected.shape}, got {shape}")
                continue
            norm = float(np.linalg.norm(expected))
            if not norm > 0:
                wrong.append(f"{program}: {name}: expected something to compare, got {norm}")
                continue
            differences[name] = float(np.linalg.norm(found - expected)) / norm
        wrong += [f"{program}: {n}: {d:.1e}" for n, d in differences.items() if not d <= tolerance]
        largest[program] = max(differences.values(), default=0.0)
    if wrong:
        raise Disagreement(
            f"expected all programs to be within {tolerance} of {reference}, got relative "
            "differences of\n  " + "\n  ".join(wrong)
        )
    return largest


def changes(losses: Sequence[float], before: Values, after: Values) -> Values:
    """Losses, and how far each array has moved: what trainings are compared by."""
    moved = {f"change of {name}": after[name] - before[name] for name in before}
    return {"losses": np.array(losses)} | moved


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers, and right-aligned."""
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    return "\n".join(lines + [f"| {' | '.join(cells)} |" for cells in rows])


def load_average() -> float | None:
    """How busy the machine was in the last minute, in running processes."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def say(text: str) -> None:
    """Tell how far it is, apart from the results."""
    print(text, file=sys.stderr, flush=True)
