"""As many bytes in one array: the limit of what saving and loading can be."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from benchmarks.harness import Sample, Values
from benchmarks.machine import seconds
from benchmarks.transformer import Task, factors


class OneArray:
    """Writes and reads one file."""

    def __init__(self, task: Task) -> None:
        self._array = np.concatenate([array.ravel() for array in factors(task).values()])

    def results(self, folder: Path) -> Values:
        """Nothing to compare."""
        return {}

    def turn(self, folder: Path) -> Sample:
        """Both once; returns the seconds of each."""
        folder.mkdir(parents=True)
        file = folder / "array.npy"
        found = {"save_s": seconds(lambda: np.save(file, self._array))}
        found["load_s"] = seconds(lambda: np.load(file))
        shutil.rmtree(folder)
        return found
