"""What happens to a folder of steps when one is written: which make room for it, and which go."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax

from jax_lora.errors import CheckpointError
from jax_lora.io import files, folders, resuming


class Writer:
    """Writes the steps of one folder, one after the other.

    It knows nothing of the `Checkpoints` that it writes for: a save that goes on would keep them
    alive, and they could not wait for it when nobody has them any more.

    Args:
        folder: The folder.
        run: The training.
        keep: How many of the last steps are kept.
        metric: The name of the metric by which the best is kept as well.
        mode: Whether the largest or the least is best.

    Attributes:
        metric: As given.
        whole: The step that the training goes on from, then the last one that is whole.
    """

    def __init__(
        self,
        folder: Path,
        run: resuming.Run,
        keep: int,
        metric: str | None,
        mode: folders.Mode,
    ):
        self.metric = metric
        self.whole: int | None = None
        self._folder, self._run, self._keep, self._mode = folder, run, keep, mode
        #: The metric of each step that is there, as far as its document can be read.
        self._metrics: dict[int, float | None] = {}

    def best(self) -> int | None:
        """The step whose metric is best; None if none has it."""
        return folders.best_of(self._read_metrics(), self._mode)

    def look(self) -> None:
        """Take in which steps are there."""
        self._metrics = self._read_metrics()

    def write(self, step: int, training: tuple[Any, Any, Any], facts: dict[str, Any]) -> None:
        """Write a step; later ones are set aside before, and old ones deleted after it.

        Args:
            step: The number of steps done.
            training: What is trained, the optimizer's state, and the keys.
            facts: The metadata, and what belongs to the state beside the arrays.

        Raises:
            CheckpointError: It cannot be written.
        """
        try:
            for later in folders.steps_in(self._folder):
                if later > (self.whole or 0):
                    folders.set_aside(self._folder, later)
                    self._metrics.pop(later, None)
            path = self._folder / str(step)
            items, document = self._run.pack(path, *training)
            document["metadata"] = facts["metadata"]
            document["state"] |= facts["state"]
            files.write(path, document, **jax.device_get(items))
            self.whole = step
            self._metrics[step] = facts["state"]["metrics"].get(self.metric)
            for old in {*self._metrics} - folders.kept(self._metrics, self._keep, self._mode):
                folders.delete(self._folder, old)
                del self._metrics[old]
        except OSError as error:
            raise CheckpointError(f"{self._folder}: cannot be written: {error}") from error

    def _read_metrics(self) -> dict[int, float | None]:
        found = {}
        for step in folders.steps_in(self._folder):
            # A damaged one is neither counted nor deleted.
            with contextlib.suppress(CheckpointError):
                document = resuming.read_document(self._folder / str(step))
                found[step] = document["state"]["metrics"].get(self.metric)
        return found
