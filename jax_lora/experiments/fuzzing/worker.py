"""Cases one after another in one process, with limits of time and memory for each."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jax_lora.errors import JaxLoraError
from jax_lora.experiments.fuzzing.mutations import Mutation, mutate
from jax_lora.experiments.fuzzing.subjects import Subject, subjects

#: Of these all others are read in milliseconds.
SLOW = "checkpoint"
#: What a process may reserve beyond what it has when all is loaded.
_ADDRESSES = 6 * 2**30


class TooLateError(BaseException):
    """A case took longer than it may."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one case.

    Attributes:
        index: The case.
        subject: What was changed.
        text: How.
        result: ``right``, ``refused``, or what went wrong.
        seconds: How long it took to load.
        megabytes: How much memory was used at most beyond what was used before.
    """

    index: int
    subject: str
    text: str
    result: str
    seconds: float
    megabytes: float

    @property
    def failed(self) -> bool:
        """Whether something went wrong."""
        return self.result not in ("right", "refused")


def case(seed: int, index: int, known: list[Subject], slow: float) -> tuple[Subject, Mutation]:
    """The case of an index, the same each time."""
    rng = np.random.default_rng([seed, index])
    is_slow = bool(rng.random() < slow)
    which = [x for x in known if x.name.startswith(SLOW) is is_slow]
    subject = which[int(rng.integers(len(which)))]
    return subject, mutate(rng, subject.files, subject.donor, "../outside")


def judge(subject: Subject, folder: Path, load: Callable[[Path], Any] | None = None) -> str:
    """``right``, ``refused``, or what is wrong with loading a folder."""
    try:
        loaded = (load or subject.load)(folder)
    except JaxLoraError as error:
        return "refused" if len(str(error)) < 1_000_000 else "an error of a million letters"
    except TooLateError:
        return "took too long"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} at {last.filename}:{last.lineno}"[:500]
    try:
        return subject.judge(loaded, folder) or "right"
    except BaseException as error:  # what the library reads and a reader of its own does not
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"was loaded, and cannot be read: {type(error).__name__}: {error} {last.lineno}"[
            :500
        ]


def run(
    seed: int, indices: range, *, slow: float, seconds: float, keep: Path | None
) -> Iterator[Outcome]:
    """The outcomes of cases; a folder that went wrong is kept.

    Args:
        seed: The seed of all cases.
        indices: The cases.
        slow: The share of orbax checkpoints, which take longer than all others.
        seconds: What each may take.
        keep: Where folders that went wrong are kept.
    """
    known = subjects()
    with tempfile.TemporaryDirectory() as where:
        # What links out of a folder point to.
        (Path(where) / "outside").write_bytes(b"{}")
        for subject in known:  # also compiles and imports what is needed
            folder = Path(where) / subject.name
            Mutation(subject.files, "").write(folder)
            result = judge(subject, folder)
            if result != "right":
                raise AssertionError(f"{subject.name}, as it was written: {result}")
        # Threads take addresses, too; what would fill this machine has to fail before.
        if size := _status("VmSize:"):
            limit = int(size * 2**20) + _ADDRESSES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for index in indices:
            subject, mutation = case(seed, index, known, slow)
            folder = Path(where) / f"{index}"
            mutation.write(folder)
            before, start = _peak(reset=True), time.perf_counter()
            with _alarm(seconds):
                result = judge(subject, folder)
            took = time.perf_counter() - start
            used = _peak() - before
            outcome = Outcome(index, subject.name, mutation.text, result, took, used)
            if outcome.failed and keep:
                shutil.copytree(folder, keep / f"case-{seed}-{index}", symlinks=True)
            shutil.rmtree(folder)
            yield outcome


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: Any) -> None:
        raise TooLateError

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _status(field: str) -> float:
    """A size of this process in megabytes, where the system tells."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    found = next((line for line in lines if line.startswith(field)), f"{field} 0")
    return int(found.split()[1]) / 1024


def _peak(*, reset: bool = False) -> float:
    """The largest memory used, or from now on if it is reset."""
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return _status("VmHWM:")


def main(argv: list[str]) -> None:
    """Run the cases that a JSON object names, and print each outcome as one."""
    options = json.loads(argv[0])
    keep = Path(options["keep"]) if options["keep"] else None
    cases = run(
        options["seed"],
        range(*options["numbers"]),
        slow=options["slow"],
        seconds=options["seconds"],
        keep=keep,
    )
    for outcome in cases:
        print(json.dumps(dataclasses.asdict(outcome)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
