"""An adapter of 100 MB is merged, switched, saved and loaded, beside every other way to do it.

Each program holds the same transformer with the same two adapters, in a process of its own:

* `merge` folds an adapter into the weights. PyTorch's programs change them in place; JAX's, under
  `jax.jit`, return new ones.
* `switch` is the loss of a few tokens with the other adapter, from the decision to the number;
  `same` is that with the same adapter again.
* `save` writes an adapter to a new folder, `load` reads it until its arrays can be used.

The losses with both adapters, the merged weights, and the arrays that come back from the disk must
be the same for all.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.harness import (
    Options,
    Report,
    Row,
    Sample,
    Samples,
    Values,
    agree,
    say,
    table,
    take_turns,
)
from benchmarks.machine import seconds
from benchmarks.transformer import Task, factors
from benchmarks.workers import Crew

OURS, HAND, ARRAY = "jax_lora", "by hand, orbax", "one array, numpy"
#: The programs: what makes a `Held` of a task, or the limit of what a disk can do.
PROGRAMS = {
    OURS: "adapters_jax:Ours",
    "jax_lora, PEFT's files": "adapters_jax:OursInPeftFiles",
    HAND: "adapters_jax:ByHand",
    "PEFT": "adapters_peft:Peft",
    ARRAY: "adapters_numpy:OneArray",
}
PARTS = ("merge", "same", "switch", "save", "load")
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptersOptions(Options):
    """Merging, switching, saving and loading an adapter of 100 MB.

    Attributes:
        width: The model's width.
        depth: Its layers.
        rank: The adapters' rank.
        programs: Which programs.
    """

    width: int = 1024
    depth: int = 8
    rank: int = 170
    programs: tuple[str, ...] = tuple(PROGRAMS)


DEFAULTS = AdaptersOptions()
QUICK = Task(width=64, depth=2, tokens=4, rank=4, vocabulary=16, optimize=False)


def two_adapters(task: Task) -> list[dict[str, np.ndarray]]:
    """The factors of two adapters, as `factors` has them: the second goes through the layers up."""
    first = factors(task)
    return [first, {name: array[::-1].copy() for name, array in first.items()}]


class Held(abc.ABC):
    """A model with two adapters, that does what is measured."""

    @abc.abstractmethod
    def loss(self, which: int) -> float:
        """The loss with one of the adapters, made active."""

    @abc.abstractmethod
    def merge(self) -> None:
        """Fold the first adapter into the weights."""

    @abc.abstractmethod
    def merged(self) -> Values:
        """The weights that `merge` made, ``[depth, in, out]`` by name; the base is itself again."""

    @abc.abstractmethod
    def save(self, folder: Path) -> None:
        """Write the first adapter."""

    @abc.abstractmethod
    def load(self, folder: Path) -> None:
        """Read it."""

    @abc.abstractmethod
    def loaded(self) -> Values:
        """What `load` read, by the names of `factors`."""

    def results(self, folder: Path) -> Values:
        """All that the programs must agree on."""
        losses = np.array([self.loss(which) for which in (0, 1)])
        self.merge()
        merged = self.merged()
        self.save(folder)
        self.load(folder)
        return {"losses": losses, **merged, **self.loaded()}

    def turn(self, folder: Path) -> Sample:
        """Everything once; returns the seconds of each part."""
        self.loss(0)
        found = {"same_s": seconds(lambda: self.loss(0)), "switch_s": seconds(lambda: self.loss(1))}
        found["merge_s"] = seconds(self.merge)
        self.merged()
        found["save_s"] = seconds(lambda: self.save(folder))
        found["load_s"] = seconds(lambda: self.load(folder))
        shutil.rmtree(folder)
        return found


def run(options: AdaptersOptions, quick: bool) -> Report:
    """Checks and measures all programs."""
    task = Task(width=options.width, depth=options.depth, tokens=4, rank=options.rank)
    task = QUICK if quick else task
    size = sum(array.nbytes for array in factors(task).values())
    factories = {name: (f"benchmarks.peers.{PROGRAMS[name]}", task) for name in options.programs}
    with tempfile.TemporaryDirectory() as where, Crew(factories, local=quick) as crew:
        places = {name: Path(where) / str(k) for k, name in enumerate(crew.subjects)}
        results = {
            name: one.call("results", places[name] / "checked")
            for name, one in crew.subjects.items()
        }
        results.pop(ARRAY, None)  # there is nothing in it
        differences = agree(results, HAND, TOLERANCE)
        say("adapters: " + ", ".join(f"{n} {d:.0e}" for n, d in differences.items()))
        samples: dict[str, Samples] = {name: {} for name in crew.subjects}
        if not quick:
            turns: dict[str, Callable[[], Sample]] = {
                name: functools.partial(one.call, "turn", places[name] / "turn")
                for name, one in crew.subjects.items()
            }
            samples = take_turns(turns, options.repeats)
    case = f"{size / 1e6:.0f} MB, {6 * task.depth} matrices"
    rows = [Row(case, n, samples[n], {"bytes": float(size)}, differences.get(n)) for n in samples]
    rows += [Row(case, name, skipped=why) for name, why in crew.missing.items()]
    return Report(rows, {"tolerance": TOLERANCE})


def tables(report: Report) -> dict[str, str]:
    """What each part takes."""
    lines = []
    for row in report.rows:
        if row.skipped:
            lines.append([row.program, row.skipped, *[""] * (len(PARTS) - 1)])
            continue
        times = {part: row.samples.get(f"{part}_s") for part in PARTS}
        cells = ["" if t is None else f"{1e3 * np.median(t):,.0f} ms" for t in times.values()]
        lines.append([row.program, *cells])
    (case,) = report.cases()
    return {"adapters": table([case, *PARTS], lines)}
