"""A folder of steps: which there are, which are kept, and how one goes."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Literal

from jax_lora.errors import CheckpointError
from jax_lora.io.files import UNFINISHED

try:
    import fcntl
except ModuleNotFoundError:  # pragma: no cover - Windows: nothing holds off a second process
    fcntl = None  # type: ignore[assignment]

Mode = Literal["min", "max"]
#: What the name of a step ends with while it is deleted, and after another branch took its place.
_GOING, _ASIDE = ".deleted", ".aside"
_LOCK = ".lock"


def steps_in(folder: Path) -> list[int]:
    """The steps of which there is a whole checkpoint, from the first to the last."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    return sorted(int(n) for n in names if n.isascii() and n.isdigit() and str(int(n)) == n)


def best_of(metrics: Mapping[int, float | None], mode: Mode) -> int | None:
    """The step with the least or largest metric; the last of several, and None without any.

    Example:
        >>> best_of({10: 0.5, 20: None, 30: 0.7, 40: 0.7}, "max")
        40
    """
    sign = 1 if mode == "max" else -1
    known = {step: sign * x for step, x in metrics.items() if x is not None and math.isfinite(x)}
    return max(known, key=lambda step: (known[step], step), default=None)


def kept(metrics: Mapping[int, float | None], keep: int, mode: Mode) -> set[int]:
    """Of these steps the last ``keep`` and the best.

    Example:
        >>> sorted(kept({10: 0.5, 20: 0.9, 30: 0.7, 40: None}, 1, "max"))
        [20, 40]
    """
    last = sorted(metrics)[-keep:]
    best = best_of(metrics, mode)
    return {*last} if best is None else {*last, best}


def delete(folder: Path, step: int) -> None:
    """Remove a step; it is whole or gone at every moment."""
    going = folder / f"{step}{_GOING}"
    (folder / str(step)).rename(going)
    shutil.rmtree(going, ignore_errors=True)


def set_aside(folder: Path, step: int) -> Path:
    """Give a step a name under which it is no step, and nothing is lost."""
    names = (f"{step}{_ASIDE}" + (f"-{n}" if n else "") for n in range(1000))
    aside = next(folder / name for name in names if not (folder / name).exists())
    return (folder / str(step)).rename(aside)


def leftovers(folder: Path) -> list[Path]:
    """What processes that were killed left half written or half deleted."""
    return [path for name in (f"*{UNFINISHED}", f"*{_GOING}") for path in folder.glob(name)]


def clear_leftovers(folder: Path) -> None:
    """Remove the `leftovers`."""
    for path in leftovers(folder):
        shutil.rmtree(path, ignore_errors=True)


def lock(folder: Path) -> IO[bytes]:
    """Take a folder for this process until the file is closed, or the process ends, however.

    Raises:
        CheckpointError: Another process has it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("ab+", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    # A file system without locks or space is no reason not to train.
    with contextlib.suppress(OSError):
        if fcntl is not None:
            _take(folder, file)
        file.truncate(0)
        file.write(str(os.getpid()).encode())
    return file


def _take(folder: Path, file: IO[bytes]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().decode(errors="replace")
        file.close()
        other = f"process {owner} does; end it, close its checkpoints"
        if owner == str(os.getpid()):
            other = "this process does through others; close these"
        raise CheckpointError(
            f"{folder}: expected to be the only one that writes there, but {other}, or choose "
            "another folder"
        ) from None
