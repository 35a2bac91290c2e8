"""Runs the article's experiment with jax_lora and with PyTorch, side by side, on the CPU.

Every program is a process of its own, on the same images, with the default number of threads. Two
times are taken: training with evaluation, as each program reports it (ours with its compilation),
and the whole command, from its start to its end, as seen from here.

* `article` and `in_memory` are the variants of `article_pytorch.py`. Their images are decoded
  beforehand, here, into one `.npz` file.
* `jax_lora, first run` starts with an empty cache of decoded images, so that its whole command
  includes decoding them; `jax_lora, second run` finds them there. No compilation cache is used.

With `--repeats` the programs take turns, so that a busy minute of the machine does not fall on one
of them alone, and the table shows medians; the saved JSON has every run. Nothing is asserted about
the ratios: they are printed beside what is expected.

Usage:
    python benchmarks/compare_article.py --data-dir ~/tensorflow_datasets --repeats 3
    python benchmarks/compare_article.py --quick
    python benchmarks/compare_article.py --save benchmarks/results/laptop.json

jax_lora with what its CIFAR-10 loader needs, torch and Pillow must be installed. Where torch lives
in another environment, name its interpreter with `--torch-python`.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
OURS = ROOT / "scripts" / "reproduce_cifar10.py"
PEER = ROOT / "benchmarks" / "article_pytorch.py"

ARTICLE = "PyTorch, article"
IN_MEMORY = "PyTorch, in_memory"
FIRST = "jax_lora, first run"
SECOND = "jax_lora, second run"
# The order in which they take turns: peers and ours alternate, and the second run of ours comes
# after the first, whose cache it uses.
PROGRAMS = (ARTICLE, FIRST, IN_MEMORY, SECOND)

# Times relative to the article's program that we mean to stay within, on the second run.
TARGET_TRAINING = 1 / 8
TARGET_WHOLE = 1 / 4
QUICK_IMAGES = 2_000


@dataclass(frozen=True)
class Run:
    """One program, run once.

    Attributes:
        program: One of `PROGRAMS`.
        repeat: Which turn it was, from 0.
        training_s: Training and evaluation of both phases, compilation included.
        compile_s: The part of it that was compilation; zero for PyTorch.
        whole_s: Wall time of the whole command.
        base: Accuracy of the base after its last epoch, 0..1.
        lora: Accuracy with LoRA after the last epoch, 0..1.
        results: What the program wrote.
    """

    program: str
    repeat: int
    training_s: float
    compile_s: float
    whole_s: float
    base: float
    lora: float
    results: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A line of the table: medians over a program's runs, and times relative to the article's."""

    program: str
    training_s: float
    whole_s: float
    training_ratio: float
    whole_ratio: float
    base: float
    lora: float


def write_arrays(data_dir: str | None, path: Path, limit: int | None = None) -> None:
    """Writes CIFAR-10, read by our own loader, in the form the PyTorch program takes.

    Args:
        data_dir: The tensorflow-datasets folder, or None for the loader's default.
        path: The `.npz` file to write.
        limit: How many training images to keep, and at most as many test images; None for all.
    """
    try:
        from jax_lora import data
    except ImportError as error:
        raise SystemExit(
            f"cannot import jax_lora.data ({error}); install the project first: "
            f"{sys.executable} -m pip install -e {ROOT}"
        ) from error
    cifar = data.load("cifar10", data_dir=data_dir)
    np.savez(
        path,
        train_images=cifar.train.images[:limit],
        train_labels=cifar.train.labels[:limit],
        test_images=cifar.test.images[:limit],
        test_labels=cifar.test.labels[:limit],
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


def run_pytorch(program: str, repeat: int, args: argparse.Namespace, data: Path, tmp: Path) -> Run:
    """Runs one variant of the PyTorch program on the arrays in `data`."""
    out = tmp / "pytorch.json"
    command: list[str | Path] = [
        args.torch_python,
        PEER,
        "--data",
        data,
        "--out",
        out,
        "--epochs",
        str(args.epochs),
    ]
    command += ["--seed", str(args.seed + repeat)]
    command += ["--variant", "article" if program == ARTICLE else "in_memory"]
    whole = timed(command, dict(os.environ))
    results = json.loads(out.read_text())
    return Run(
        program=program,
        repeat=repeat,
        training_s=results["base"]["seconds"] + results["lora"]["seconds"],
        compile_s=0.0,
        whole_s=whole,
        base=results["base"]["accuracy"][-1],
        lora=results["lora"]["accuracy"][-1],
        results=results,
    )


def run_ours(program: str, repeat: int, args: argparse.Namespace, cache: Path, tmp: Path) -> Run:
    """Runs our script with `cache` as its folder of decoded images."""
    out = tmp / f"ours-{repeat}-{PROGRAMS.index(program)}"
    command: list[str | Path] = [sys.executable, OURS, "--dataset", "cifar10", "--out", out]
    command += ["--seed", str(args.seed + repeat), "--epochs", str(args.epochs)]
    if args.data_dir is not None:
        command += ["--data-dir", args.data_dir]
    command += ["--cache-dir", cache]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    # A warm compilation cache would hide a cost that is ours.
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    whole = timed(command, env)
    if not any(cache.rglob("*.npy")):
        # Then the first run may have read a cache elsewhere, and would not be a first run.
        raise SystemExit(
            f"expected decoded images (.npy) in --cache-dir {cache} after {OURS.name}, got "
            "none; the first and the second run cannot be told apart"
        )
    written = json.loads((out / "results.json").read_text())
    # What says where things lie on this machine is of no use to a reader.
    results = {key: written[key] for key in ("base", "lora", "seconds", "versions", "hardware")}
    phases = [results["seconds"]["base"], results["seconds"]["lora"]]
    compile_s = sum(phase["compile"] for phase in phases)
    return Run(
        program=program,
        repeat=repeat,
        training_s=compile_s + sum(phase["run"] for phase in phases),
        compile_s=compile_s,
        whole_s=whole,
        base=results["base"]["accuracy"][-1],
        lora=results["lora"]["accuracy"][-1],
        results=results,
    )


def take_turns(args: argparse.Namespace, data: Path, tmp: Path) -> list[Run]:
    """Runs every program `args.repeats` times, one after the other; says how each went."""
    runs: list[Run] = []
    for repeat in range(args.repeats):
        with tempfile.TemporaryDirectory(prefix="cache-", dir=tmp) as cache:
            for program in PROGRAMS:
                if program in (FIRST, SECOND):
                    run = run_ours(program, repeat, args, Path(cache), tmp)
                else:
                    run = run_pytorch(program, repeat, args, data, tmp)
                print(
                    f"{repeat + 1}/{args.repeats} {program}: training + evaluation "
                    f"{run.training_s:.1f} s (compilation {run.compile_s:.1f} s), "
                    f"whole command {run.whole_s:.1f} s",
                    flush=True,
                )
                runs.append(run)
    return runs


def summarise(runs: Sequence[Run]) -> list[Row]:
    """Medians per program, in the order of `PROGRAMS`, with ratios of the medians.

    Args:
        runs: Runs that include the article's program.
    """

    def median(program: str, name: str) -> float:
        return statistics.median(getattr(run, name) for run in runs if run.program == program)

    present = {run.program for run in runs}
    return [
        Row(
            program=program,
            training_s=median(program, "training_s"),
            whole_s=median(program, "whole_s"),
            training_ratio=median(program, "training_s") / median(ARTICLE, "training_s"),
            whole_ratio=median(program, "whole_s") / median(ARTICLE, "whole_s"),
            base=median(program, "base"),
            lora=median(program, "lora"),
        )
        for program in sorted(present, key=PROGRAMS.index)
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    heads = ["program", "training + evaluation, s", "whole command, s"]
    heads += ["ratio to the article's program (training + evaluation; whole)"]
    heads += ["base acc.", "LoRA acc."]
    lines = [f"| {' | '.join(heads)} |", "|---|---:|---:|---:|---:|---:|"]
    lines += [
        f"| {row.program} | {row.training_s:.1f} | {row.whole_s:.1f} "
        f"| {row.training_ratio:.3f}; {row.whole_ratio:.3f} "
        f"| {100 * row.base:.1f} % | {100 * row.lora:.1f} % |"
        for row in rows
    ]
    return "\n".join(lines)


def expectations(rows: Sequence[Row]) -> str:
    """What was expected of the second run of ours, and what was measured."""
    (ours,) = [row for row in rows if row.program == SECOND]
    lines = []
    for what, target, got in (
        ("training + evaluation, compilation included", TARGET_TRAINING, ours.training_ratio),
        ("whole command on prepared data", TARGET_WHOLE, ours.whole_ratio),
    ):
        verdict = "reached" if got <= target else "missed"
        lines.append(
            f"{what}: expected at most {target:.3f} of the article's program, got {got:.3f}: "
            f"{verdict}"
        )
    return "\n".join(lines)


def hardware() -> dict[str, Any]:
    """The CPU's name, the number of cores usable here, and how busy the machine was before."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"cpu": name, "cores": usable, "load_average_before": load}


def versions(runs: Sequence[Run]) -> dict[str, str]:
    """Versions of what the programs stand on; torch's as its own process reported it."""
    found = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    for run in runs:
        if run.program == ARTICLE:
            found["torch"] = run.results["torch"]
    return found


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, from `argv` or from `sys.argv`."""
    parser = argparse.ArgumentParser(
        description="The article's experiment with jax_lora and with PyTorch, side by side."
    )
    parser.add_argument("--data-dir", help="tensorflow-datasets folder; default: the loader's")
    parser.add_argument("--epochs", type=_positive, default=5, help="epochs of each phase")
    parser.add_argument("--seed", type=int, default=0, help="of the first repeat; then one more")
    parser.add_argument("--repeats", type=_positive, default=1)
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"only check that all run: 1 epoch, and {QUICK_IMAGES:,} images for PyTorch",
    )
    parser.add_argument("--save", type=Path, help="JSON file for every run and the table")
    parser.add_argument(
        "--torch-python", default=sys.executable, help="Python that has torch; default: this one"
    )
    args = parser.parse_args(argv)
    if args.data_dir is not None:
        # The programs run in the repository's root, wherever this one was started.
        args.data_dir = str(Path(args.data_dir).expanduser().resolve())
    if args.quick:
        args.epochs = 1
    return args


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the comparison, prints it, saves it if asked, and returns the table's rows."""
    args = parse_args(argv)
    if not OURS.exists():
        raise SystemExit(f"expected our program at {OURS}, got no such file")
    if args.save is not None:
        # Now, rather than after all the runs.
        args.save.parent.mkdir(parents=True, exist_ok=True)
    machine = hardware()
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    with tempfile.TemporaryDirectory(prefix="compare-article-") as folder:
        data = Path(folder) / "cifar10.npz"
        write_arrays(args.data_dir, data, QUICK_IMAGES if args.quick else None)
        runs = take_turns(args, data, Path(folder))

    rows = summarise(runs)
    found = versions(runs)
    # PyTorch on a subset beside ours on everything: no ratio of these means anything.
    comparable = not args.quick
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    print(f"{args.epochs} + {args.epochs} epochs, medians of {args.repeats}\n")
    print(table(rows) + "\n")
    if comparable:
        print(expectations(rows))
    else:
        print(f"--quick: PyTorch saw {QUICK_IMAGES:,} images and ours all; ignore times and ratios")
    if args.save is not None:
        saved = {
            "hardware": machine,
            "versions": found,
            "settings": {"epochs": args.epochs, "seed": args.seed, "repeats": args.repeats},
            "comparable": comparable,
            "expected": {"training_ratio": TARGET_TRAINING, "whole_ratio": TARGET_WHOLE},
            "table": [asdict(row) for row in rows],
            "runs": [asdict(run) for run in runs],
        }
        args.save.write_text(json.dumps(saved, indent=2) + "\n")
        print(f"saved to {args.save}")
    return rows


if __name__ == "__main__":
    main()
