"""A training that is killed again and again, and has to end with the bits of one that was not.

The training is `finetune` itself, with dropout and shuffling, in a process of its own that saves as
fast as it can. A life of it ends with SIGKILL at a random moment, or when the training is done; the
next one resumes. It writes into a journal which steps it does before it does them, and the journal
is on the disk by then. From this and from the checkpoints that are whole after a kill it is seen
that each life begins where the last whole save was, so that nothing else is done twice.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jax_lora as jl
from jax_lora import report
from jax_lora.data import Dataset, Split
from jax_lora.errors import ConfigError, JaxLoraError
from jax_lora.experiments import environment
from jax_lora.experiments.article import FinetuneLora
from jax_lora.experiments.options import DataOptions, describe
from jax_lora.experiments.phases import finetune, load_data, same_bits
from jax_lora.io import folders, resuming
from jax_lora.models import MLP

_BASE, _DATA, _JOB, _JOURNAL, _STEPS = "base", "data.npz", "job.json", "journal", "checkpoints"
_WIDTH = 32
#: A life ends at most so many seconds after its first step, if it is ended.
_LONGEST_S = 0.6
#: One in so many lives ends before its first step, within so many seconds of its start.
_EARLY, _EARLY_S = 8, 4.0
_PATIENCE_S = 300.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrashDrill(DataOptions):
    """Kill a training at random moments, resume it, and compare it with one that was never killed.

    Attributes:
        kills: How often it is killed at least; when a training is done, another one begins.
        epochs: Epochs of a training.
        save_every_steps: Steps between two saves, if the first is done by then.
        seed: The moments derive from it.
        examples: Of each split, so many are used at most.
        out: A JSON file for what happened.
    """

    kills: int = 50
    epochs: int = 40
    save_every_steps: int = 5
    seed: int = 0
    examples: int = 1400
    out: Path | None = None


@dataclasses.dataclass(frozen=True)
class Moment:
    """When a life ends.

    Attributes:
        early: Counted from the start of the process, and not from the first step.
        seconds: After so many seconds.
    """

    early: bool
    seconds: float

    @classmethod
    def draw(cls, generator: random.Random) -> Moment:
        """A random one."""
        early = not generator.randrange(_EARLY)
        return cls(early, round(generator.uniform(0, _EARLY_S if early else _LONGEST_S), 4))


@dataclasses.dataclass(frozen=True)
class Life:
    """What one process did.

    Attributes:
        moment: When it was to be killed, if it was.
        killed: Whether it was killed, or was done.
        first: The step where it began, None if it did not get so far.
        last: The step before which it ended; one of the part that it was in, when it was killed.
        whole: The last whole save after it.
        while_saving: Whether it left a save half written, or half deleted.
    """

    moment: Moment | None
    killed: bool
    first: int | None
    last: int | None
    whole: int
    while_saving: bool


def run_drill(options: CrashDrill) -> dict[str, Any]:
    """Run the drill, print and return what happened.

    Raises:
        JaxLoraError: A training did not end with the same bits, or did other steps twice than those
            after the last whole save, or failed by itself.
    """
    if options.out is not None and options.out.exists():
        raise ConfigError(f"expected --out to be a new file, but {options.out} exists")
    lives: list[Life] = []
    generator = random.Random(options.seed)

    def moments() -> Iterator[Moment]:
        while summary(lives)["kills"] < options.kills:
            yield Moment.draw(generator)

    with tempfile.TemporaryDirectory(prefix="crash-drill-") as name:
        folder = Path(name)
        _prepare(folder, options)
        *_, reference = _lives(folder / "reference", iter(()))
        print(f"never killed: {reference.whole:,} steps; seed {options.seed}", flush=True)
        for trainings in itertools.count(1):
            out = folder / str(trainings)
            for life in _lives(out, moments()):
                lives.append(life)
                print(f"training {trainings}, life {len(lives)}: {life}", flush=True)
            _compare(out / _STEPS, folder / "reference" / _STEPS)
            if summary(lives)["kills"] >= options.kills:
                break
    results = summary(lives) | {
        "trainings": trainings,
        "steps": reference.whole,
        "config": describe(options),
        "versions": environment.versions(),
        "hardware": environment.hardware(),
    }
    print(
        f"{results['kills']} kills, {results['while_saving']} of them while saving, "
        f"{results['before_first_step']} before the first step; {results['repeated']:,} steps done "
        f"twice, at most {results['most_repeated']:,} after a kill, all since the last whole save; "
        f"{trainings} trainings with the bits of the one that was never killed"
    )
    if options.out is not None:
        report.write_json(results, options.out)
    return results


def summary(lives: list[Life]) -> dict[str, Any]:
    """What happened in these lives, in numbers."""
    killed = [life for life in lives if life.killed]
    repeated = [life.last - life.whole for life in killed if life.last is not None]
    return {
        "kills": len(killed),
        "while_saving": sum(life.while_saving for life in killed),
        "before_first_step": sum(life.first is None for life in killed),
        "repeated": sum(repeated),
        "most_repeated": max(repeated, default=0),
    }


def _prepare(folder: Path, options: CrashDrill) -> None:
    """A base, data and a job, ready to be read in every life."""
    dataset = load_data(options)
    model = MLP((_WIDTH, dataset.num_classes))
    example = np.zeros((1, int(np.prod(dataset.image_shape))), np.float32)
    jl.io.save_params(folder / _BASE, model.init(jax.random.key(options.seed), example))
    train, test = dataset.train, dataset.test
    np.savez(
        folder / _DATA,
        train_images=train.images[: options.examples],
        train_labels=train.labels[: options.examples],
        test_images=test.images[: options.examples],
        test_labels=test.labels[: options.examples],
    )
    job = {
        "epochs": options.epochs,
        "save_every_steps": options.save_every_steps,
        "name": dataset.name,
        "label_names": dataset.label_names,
        "max_value": dataset.max_value,
        "source": dataset.source,
    }
    (folder / _JOB).write_text(json.dumps(job))


def live(out: Path) -> None:
    """One life: begin or resume, and train until the end, or until killed."""
    folder = out.parent
    job, arrays = json.loads((folder / _JOB).read_text()), np.load(folder / _DATA)
    dataset = Dataset(
        name=job["name"],
        train=Split(arrays["train_images"], arrays["train_labels"]),
        test=Split(arrays["test_images"], arrays["test_labels"]),
        label_names=tuple(job["label_names"]),
        max_value=job["max_value"],
        source=job["source"],
    )
    options = FinetuneLora(
        base=folder / _BASE,
        epochs=job["epochs"],
        save_every_steps=job["save_every_steps"],
        keep_best="accuracy",
        resume=True,
        rank=4,
        dropout=0.2,
        learning_rate=0.02,
        num_devices=1,
    )
    params, _ = jl.io.load_params(options.base)
    journal = os.open(out / _JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def watch(start: int, stop: int) -> None:
        os.write(journal, f"{os.getpid()} {start} {stop}\n".encode())
        os.fsync(journal)

    finetune(options, MLP((_WIDTH, dataset.num_classes)), params, dataset, out / _STEPS, watch)
    os.close(journal)


def _lives(out: Path, moments: Iterator[Moment]) -> Iterator[Life]:
    """The lives of a training until it is done; they end at these moments, as long as there are."""
    out.mkdir()
    whole, killed = 0, True
    while killed:
        began, moment = time.time(), next(moments, None)
        process = _start(out)
        try:
            killed = _end(process, out, moment)
        finally:
            process.kill()
            process.wait()
        if not killed and process.returncode:
            raise JaxLoraError(
                f"expected a training that resumes, got exit code {process.returncode}:\n"
                + (out / "log").read_text()[-4000:]
            )
        parts, steps = _parts(out, process.pid), out / _STEPS
        if any(end != begin for (_, end), (begin, _) in itertools.pairwise(parts)):
            raise JaxLoraError(f"expected the steps in turn, found {parts}")
        if parts and parts[0][0] != whole:
            raise JaxLoraError(
                f"expected to resume at step {whole}, the last whole save, found {parts[0][0]}"
            )
        whole = max(folders.steps_in(steps), default=0)
        yield Life(
            moment=moment,
            killed=killed,
            first=parts[0][0] if parts else None,
            last=parts[-1][1] if parts else None,
            whole=whole,
            while_saving=any(x.stat().st_mtime >= began for x in folders.leftovers(steps)),
        )


def _start(out: Path) -> subprocess.Popen[bytes]:
    code = f"from pathlib import Path; from {__name__} import live; live(Path({str(out)!r}))"
    cache = {
        # What the first training compiles the others read, so that a life is short.
        "JAX_COMPILATION_CACHE_DIR": str(out.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    with (out / "log").open("wb") as log:
        command = [sys.executable, "-c", code]
        return subprocess.Popen(command, env=os.environ | cache, stdout=log, stderr=log)


def _end(process: subprocess.Popen[bytes], out: Path, moment: Moment | None) -> bool:
    """Wait for a process to be done, or for the moment to kill it; whether it was killed."""
    if moment is not None and not moment.early:
        _wait_for_step(process, out)
    try:
        process.wait(_PATIENCE_S if moment is None else moment.seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return process.returncode == -signal.SIGKILL


def _wait_for_step(process: subprocess.Popen[bytes], out: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while process.poll() is None and not _parts(out, process.pid):
        if time.monotonic() > deadline:
            raise JaxLoraError(f"expected a step within {_PATIENCE_S:.0f} s, found none")
        time.sleep(0.005)


def _parts(out: Path, pid: int) -> list[tuple[int, int]]:
    """The parts that a process did or was about to do, each from one step to before another."""
    try:
        lines = (out / _JOURNAL).read_text().splitlines()
    except FileNotFoundError:
        return []
    numbers = [[int(word) for word in line.split()] for line in lines]
    return [(first, last) for owner, first, last in numbers if owner == pid]


def _compare(found: Path, expected: Path) -> None:
    """Compare what two trainings ended with: adapter, optimizer's state, losses and accuracies."""
    ends = [
        resuming.read(folder / str(folders.steps_in(folder)[-1])) for folder in (found, expected)
    ]
    steps = [document["state"]["step"] for document, _ in ends]
    histories = [document["metadata"]["history"] for document, _ in ends]
    for history in histories:
        del history["seconds"], history["resumed_at"]
    if steps[0] != steps[1] or not same_bits(ends[0][1], ends[1][1]):
        raise JaxLoraError(f"expected the bits of {expected}, found others in {found}")
    if histories[0] != histories[1]:
        raise JaxLoraError(f"expected the losses and accuracies of {expected}, found others")
