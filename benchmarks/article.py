"""The article's job, end to end: jax_lora's script beside PyTorch's programs.

First the programs must agree, step by step, from the same weights on the same batches. Then every
program is a process of its own, on the same images, with the default number of threads. Two times
are taken: training with evaluation, as each program reports it (ours with its compilation), and the
whole command, from its start to its end, as seen from here.

The PyTorch programs are the variants of `benchmarks/peers/article_pytorch.py`; their images are
decoded beforehand, here, into one `.npz` file. Ours runs twice: first with an empty cache of
decoded images, so that its whole command includes decoding them, then with what the first left
there. No compilation cache is used.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Options, Report, Row, Sample, agree, say, table, take_turns
from benchmarks.workers import Crew

ROOT = Path(__file__).resolve().parents[1]
FIRST, SECOND = "jax_lora, first run", "jax_lora, second run"
#: PyTorch's programs, with their variants.
VARIANTS = {
    "PyTorch, article": "article",
    "PyTorch, in memory": "in_memory",
    "PyTorch, torch.compile": "compiled",
}
#: In this order they take turns: the second run of ours uses the cache that the first one left.
PROGRAMS = ("PyTorch, article", FIRST, "PyTorch, in memory", SECOND, "PyTorch, torch.compile")
#: Of the differences between the changes that some steps make to a weight.
TOLERANCE = 1e-3
#: How many times faster than another program we mean to be, in training with evaluation.
TARGETS = {"PyTorch, article": 8.0, "PyTorch, in memory": 2.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArticleOptions(Options):
    """The article's experiment on CIFAR-10.

    Attributes:
        repeats: How often each program runs; each time with another seed.
        data_dir: The tensorflow-datasets folder; by default the loader's.
        epochs: Epochs of each phase.
        seed: The first seed.
        programs: Which programs.
        torch_python: A Python that has PyTorch.
    """

    repeats: int = 3
    data_dir: Path | None = None
    epochs: int = 5
    seed: int = 0
    programs: tuple[str, ...] = PROGRAMS
    torch_python: str = sys.executable


DEFAULTS = ArticleOptions()


def check() -> dict[str, float]:
    """Lets all programs take their first steps from the same start.

    Returns:
        By program, its largest relative difference from ours.
    """
    module = "benchmarks.peers.article_steps"
    factories: dict[str, tuple[Any, ...]] = {SECOND: (f"{module}:OurSteps",)}
    # What torch.compile makes is left out here: building it takes longer than all the rest.
    factories |= {
        program: (f"{module}:TorchSteps", variant)
        for program, variant in VARIANTS.items()
        if variant != "compiled"
    }
    with Crew(factories, local=True) as crew:
        differences = agree(crew.ask("results"), SECOND, TOLERANCE)
        for program, why in crew.missing.items():
            say(f"{program}: {why}")
    say("article: " + ", ".join(f"{n} {d:.0e}" for n, d in differences.items()))
    return differences


def write_arrays(data_dir: Path | None, path: Path) -> None:
    """Writes CIFAR-10, read by our own loader, in the form the PyTorch programs take."""
    from jax_lora import data

    cifar = data.load("cifar10", data_dir=data_dir)
    np.savez(
        path,
        train_images=cifar.train.images,
        train_labels=cifar.train.labels,
        test_images=cifar.test.images,
        test_labels=cifar.test.labels,
    )


def timed(command: Sequence[str | Path], env: dict[str, str]) -> float:
    """Runs a command to its end and returns its wall time; its failure is ours."""
    started = time.perf_counter()
    done = subprocess.run(
        [str(part) for part in command],
        env=env,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-30:])
        line = " ".join(map(str, command))
        raise SystemExit(f"expected exit status 0, got {done.returncode}: {line}\n{tail}")
    return seconds


class Job:
    """One program, run again and again, each time with the next seed."""

    def __init__(self, program: str, options: ArticleOptions, data: Path, tmp: Path) -> None:
        self._program, self._options, self._data, self._tmp = program, options, data, tmp
        self._runs = 0

    def __call__(self) -> Sample:
        """Run it once."""
        name = f"{PROGRAMS.index(self._program)}-{self._runs}"
        seed = str(self._options.seed + self._runs)
        shared = ["--seed", seed, "--epochs", str(self._options.epochs)]
        run = self._pytorch if self._program in VARIANTS else self._ours
        sample = run(shared, self._tmp / name)
        self._runs += 1
        sample = {"training_s": sample["base_s"] + sample["lora_s"], **sample}
        say(
            f"{self._program}: training + evaluation {sample['training_s']:.1f} s (compilation "
            f"{sample['compile_s']:.1f} s), whole command {sample['whole_s']:.1f} s"
        )
        return sample

    def _pytorch(self, shared: list[str], out: Path) -> dict[str, float]:
        out = out.with_suffix(".json")
        command: list[str | Path] = [self._options.torch_python, "-m"]
        command += ["benchmarks.peers.article_pytorch", "--data", self._data, "--out", out]
        command += ["--variant", VARIANTS[self._program], *shared]
        whole_s = timed(command, dict(os.environ))
        results = json.loads(out.read_text())
        found = {"compile_s": 0.0, "whole_s": whole_s}
        for phase in ("base", "lora"):
            found[f"{phase}_s"] = results[phase]["seconds"]
            found[f"{phase}_accuracy"] = results[phase]["accuracy"][-1]
        return found

    def _ours(self, shared: list[str], out: Path) -> dict[str, float]:
        # A cache for each seed's first and second run.
        cache = self._tmp / f"cache-{self._runs}"
        command: list[str | Path] = [sys.executable, "scripts/reproduce_cifar10.py", *shared]
        command += ["--dataset", "cifar10", "--out", out, "--cache-dir", cache]
        if self._options.data_dir is not None:
            # The programs run in the repository's root, wherever this one was started.
            command += ["--data-dir", self._options.data_dir.expanduser().resolve()]
        # A warm compilation cache would hide a cost that is ours.
        env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
        whole_s = timed(command, env)
        if not any(cache.rglob("*.npy")):
            raise SystemExit(
                f"expected decoded images (.npy) in --cache-dir {cache}, got none; the first and "
                "the second run cannot be told apart"
            )
        results = json.loads((out / "results.json").read_text())
        found = {"compile_s": 0.0, "whole_s": whole_s}
        for phase in ("base", "lora"):
            spent = results["seconds"][phase]
            found["compile_s"] += spent["compile"]
            found[f"{phase}_s"] = spent["compile"] + spent["run"]
            found[f"{phase}_accuracy"] = results[phase]["accuracy"][-1]
        return found


def run(options: ArticleOptions, quick: bool) -> Report:
    """Checks the first steps, then runs all programs in turns."""
    differences = check()
    names = [name for name in PROGRAMS if name in options.programs]
    if quick:
        return Report([Row("article", n, difference=differences.get(n)) for n in names])
    with tempfile.TemporaryDirectory(prefix="article-") as folder:
        data = Path(folder) / "cifar10.npz"
        write_arrays(options.data_dir, data)
        jobs: dict[str, Callable[[], Sample]] = {
            name: Job(name, options, data, Path(folder)) for name in names
        }
        samples = take_turns(jobs, options.repeats, warm_up=0, rotate=False)
    case = f"{options.epochs} + {options.epochs} epochs"
    rows = [Row(case, n, samples[n], difference=differences.get(n)) for n in names]
    return Report(rows, {"tolerance": TOLERANCE, "targets": TARGETS})


def tables(report: Report) -> dict[str, str]:
    """What each program takes, and how many times longer than ours that is."""
    (case,) = report.cases()
    heads = ["program", "training and evaluation", "of that, compiling", "this / ours"]
    heads += ["whole command", "base", "LoRA"]
    lines = []
    for row in report.rows:
        ratio = report.ratio(case, row.program, SECOND, "training_s")
        lines.append(
            [
                row.program,
                f"{row.median('training_s'):.1f} s",
                f"{row.median('compile_s'):.1f} s" if row.program in (FIRST, SECOND) else "",
                "" if row.program == SECOND else str(ratio),
                f"{row.median('whole_s'):.1f} s",
                *(f"{100 * row.median(f'{phase}_accuracy'):.1f} %" for phase in ("base", "lora")),
            ]
        )
    return {"article": table(heads, lines)}
