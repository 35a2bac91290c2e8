"""Thousands of cases in worker processes that may crash, and what came of them."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax_lora
from jax_lora.errors import ConfigError, JaxLoraError
from jax_lora.experiments.fuzzing.worker import Outcome
from jax_lora.tables import count, format_table

_WORKER = "jax_lora.experiments.fuzzing.worker"


class FuzzError(JaxLoraError):
    """Cases that went wrong."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fuzz:
    """Damage files of adapters and checkpoints, load each, and check what was loaded.

    Attributes:
        cases: How many.
        seed: The seed; a case is the same for the same seed, share of slow ones, and number.
        only: The number of one case, to repeat it.
        workers: Processes at a time.
        slow: The share of orbax checkpoints, which take twenty times as long as all others.
        seconds: What a case may take.
        megabytes: What a case may take beyond what was taken before.
        keep: Where the files of cases that went wrong are kept; by default nowhere.
    """

    cases: int = 10_000
    seed: int = 0
    only: int | None = None
    workers: int = 2
    slow: float = 0.15
    seconds: float = 20.0
    megabytes: float = 600.0
    keep: Path | None = None


def fuzz(options: Fuzz) -> list[Outcome]:
    """Run the cases and print what came of them.

    Raises:
        FuzzError: Names every case that went wrong.
        ConfigError: An option out of range.
    """
    if min(options.cases, options.workers, options.seconds, options.megabytes) <= 0:
        raise ConfigError("expected --cases, --workers, --seconds and --megabytes above 0")
    last = options.cases if options.only is None else options.only + 1
    numbers = range(options.only or 0, last)
    print(f"{count(len(numbers))} cases of seed {options.seed}", flush=True)
    outcomes = []
    for outcome in _outcomes(options, numbers):
        outcomes.append(outcome)
        if outcome.failed or options.only is not None:
            print(f"case {outcome.index}: {outcome.subject}: {outcome.text}: {outcome.result}")
        elif len(outcomes) % 1000 == 0:
            print(f"{count(len(outcomes))} cases", flush=True)
    print(summary(outcomes))
    failed = [outcome for outcome in outcomes if outcome.failed]
    if failed:
        cases = ", ".join(str(outcome.index) for outcome in failed[:20])
        raise FuzzError(
            f"expected every case to be read right or refused, {len(failed)} were not: {cases}; "
            f"repeat one with --seed {options.seed} --slow {options.slow} --only {failed[0].index}"
        )
    return outcomes


def summary(outcomes: list[Outcome]) -> str:
    """A table of what came of the cases, by what was damaged."""
    rows = []
    for subject in sorted({outcome.subject for outcome in outcomes}):
        mine = [outcome for outcome in outcomes if outcome.subject == subject]
        results = Counter("wrong" if x.failed else x.result for x in mine)
        rows.append(
            (
                subject,
                *(count(results[x]) for x in ("right", "refused", "wrong")),
                f"{max(x.seconds for x in mine):.2f} s",
                f"{max(x.megabytes for x in mine):.0f} MB",
            )
        )
    header = ("damaged", "read right", "refused", "wrong", "slowest", "most memory")
    return format_table(header, rows, right=range(1, 6))


def _outcomes(options: Fuzz, numbers: range) -> Iterator[Outcome]:
    """The outcomes of all workers, as they come."""
    found: queue.Queue[Outcome | None] = queue.Queue()
    shares = [numbers[k :: options.workers] for k in range(options.workers)]
    shares = [share for share in shares if share]
    threads = [
        threading.Thread(target=_share, args=(options, share, found), daemon=True)
        for share in shares
    ]
    for thread in threads:
        thread.start()
    left = len(threads)
    while left:
        outcome = found.get()
        if outcome is None:
            left -= 1
        else:
            yield outcome


def _share(options: Fuzz, numbers: range, found: queue.Queue[Outcome | None]) -> None:
    """One worker's cases: a process that ends is replaced, and its case went wrong."""
    try:
        while numbers:
            done = 0
            process = _start(options, numbers)
            assert process.stdout is not None
            # One that does not even obey its own alarm is ended from here.
            timer = _restarted(None, process, options)
            for line in process.stdout:
                timer = _restarted(timer, process, options)
                found.put(_limited(Outcome(**json.loads(line)), options))
                done += 1
            timer.cancel()
            code = process.wait()
            numbers = numbers[done:]
            if numbers and (code or not done):
                ended = f"the process ended with {code}"
                found.put(Outcome(numbers[0], "?", "repeat it with --only", ended, 0.0, 0.0))
                numbers = numbers[1:]
    finally:
        found.put(None)


def _limited(outcome: Outcome, options: Fuzz) -> Outcome:
    if outcome.failed or outcome.megabytes <= options.megabytes:
        return outcome
    return dataclasses.replace(outcome, result=f"took {outcome.megabytes:.0f} MB")


def _start(options: Fuzz, numbers: range) -> subprocess.Popen[str]:
    settings: dict[str, Any] = {
        "seed": options.seed,
        "numbers": [numbers.start, numbers.stop, numbers.step],
        "slow": options.slow,
        "seconds": options.seconds,
        "keep": str(options.keep) if options.keep else None,
    }
    root = str(Path(jax_lora.__file__).parents[1])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", _WORKER, json.dumps(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # what orbax logs about files that it cannot read
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
    )


def _restarted(
    timer: threading.Timer | None, process: subprocess.Popen[str], options: Fuzz
) -> threading.Timer:
    if timer is not None:
        timer.cancel()
    timer = threading.Timer(3 * options.seconds + 120, process.kill)
    timer.daemon = True
    timer.start()
    return timer
