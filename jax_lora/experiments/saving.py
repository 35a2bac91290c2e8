"""Training checkpoints of a phase: what they hold beside the arrays, when they are written."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.config import LoraConfig
from jax_lora.errors import ConfigError
from jax_lora.experiments.options import CheckpointOptions, TrainOptions
from jax_lora.io import Checkpoints, Position
from jax_lora.training import TrainState

#: With ``--save-every-minutes`` the clock is read about so often.
_SECONDS_BETWEEN_LOOKS = 2.0
_FIRST_LOOK = 32
_KEY = "run"


@dataclasses.dataclass
class History:
    """What a phase has measured so far.

    Attributes:
        window: The number of steps in a window; a window never spans two epochs.
        accuracy_before: On the test split before the first step.
        accuracy: On the test split after each epoch.
        loss: The mean of each window.
        pending: The losses of the steps since the last full window.
        seconds: Training and evaluating, before this process and in it.
        resumed_at: The numbers of steps done where it went on after interruptions.
    """

    window: int
    accuracy_before: float = float("nan")
    accuracy: list[float] = dataclasses.field(default_factory=list)
    loss: list[float] = dataclasses.field(default_factory=list)
    pending: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    resumed_at: list[int] = dataclasses.field(default_factory=list)

    def add(self, losses: np.ndarray) -> None:
        """The losses of the next steps of an epoch."""
        self.pending += losses.tolist()
        while len(self.pending) >= self.window:
            full = np.array(self.pending[: self.window], np.float32)
            self.loss.append(float(full.mean()))
            del self.pending[: self.window]

    def end_epoch(self, accuracy: float) -> None:
        """The accuracy after an epoch; what does not fill a window is left out."""
        self.accuracy.append(accuracy)
        self.pending.clear()


@dataclasses.dataclass
class Progress:
    """Where a phase is.

    Attributes:
        state: The state after the steps that are done.
        key: The key of the phase.
        history: What it has measured.
        epoch: The epoch, counted from 0.
        step: The steps of it that are done.
    """

    state: TrainState
    key: jax.Array
    history: History
    epoch: int = 0
    step: int = 0

    @property
    def at_start(self) -> bool:
        """Whether no step is done."""
        return not self.epoch and not self.step

    def advance(self, step: int, losses: np.ndarray) -> None:
        """The epoch is done up to a step, with the losses since the last."""
        self.step = step
        self.history.add(losses)

    def end_epoch(self, accuracy: float) -> None:
        """The next epoch; of the last one the accuracy is known."""
        self.epoch, self.step = self.epoch + 1, 0
        self.history.end_epoch(accuracy)


@dataclasses.dataclass(frozen=True)
class Saving:
    """Where and when a phase is saved, and what has to be the same when it is resumed.

    Attributes:
        folder: The folder of its training checkpoints.
        options: When, how many, and whether to resume.
        run: What has to be the same, by name.
        config: The configuration of the adapter, if there is one.
    """

    folder: Path
    options: CheckpointOptions
    run: Mapping[str, Any]
    config: LoraConfig | None = None


class Saver:
    """Saves a phase as it goes, and finds where it was."""

    def __init__(self, saving: Saving, frozen: Any, options: TrainOptions, examples: int):
        chosen = saving.options
        best = None if chosen.keep_best == "none" else chosen.keep_best
        self._saving, self._options, self._examples = saving, options, examples
        self.checkpoints = Checkpoints(
            saving.folder,
            base=frozen,
            config=saving.config,
            run=saving.run,
            keep=chosen.keep,
            best=best,
            mode="min" if best == "loss" else "max",
            every_steps=chosen.save_every_steps,
            every_minutes=chosen.save_every_minutes,
        )
        self._looked_at, self._looked_after = time.monotonic(), 0
        self._between_looks = _FIRST_LOOK

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.checkpoints.__exit__(*error)

    def resume(self, fresh: Progress) -> Progress:
        """Where the phase goes on: where it was saved, or at its start.

        Raises:
            ConfigError: There are checkpoints and it shall not be resumed, or it is further.
            CheckpointError: As `Checkpoints.restore` and `Checkpoints.claim`.
            AdapterError: As `Checkpoints.restore`.
        """
        progress = self._restored(fresh) if self.checkpoints.steps else fresh
        self.checkpoints.claim()
        self._looked_after = int(progress.state.step)
        return progress

    def _restored(self, fresh: Progress) -> Progress:
        folder, chosen, state = self._saving.folder, self._saving.options, fresh.state
        if not chosen.resume:
            raise ConfigError(
                f"expected no training checkpoints in {folder}, found the steps "
                f"{', '.join(map(str, self.checkpoints.steps))}; pass --resume to go on, or choose "
                "another folder with --checkpoints"
            )
        found = self.checkpoints.restore(state.trained, state.opt_state, fall_back=chosen.fall_back)
        at = found.position
        assert at is not None
        begun = at.epoch + (at.step > 0)
        if begun > self._options.epochs:
            raise ConfigError(
                f"expected --epochs of at least {begun}, of which so many were begun in {folder}, "
                f"got {self._options.epochs}"
            )
        state = dataclasses.replace(
            state, step=jnp.int32(found.step), trained=found.trained, opt_state=found.opt_state
        )
        history = History(**found.metadata["history"])
        if at.epoch < self._options.epochs:
            history.resumed_at.append(found.step)
        return Progress(state, found.keys[_KEY], history, at.epoch, at.step)

    def next_stop(self, done: int) -> int:
        """After how many steps to ask again whether to save, the ``done`` ones included."""
        stops = []
        if (every := self._saving.options.save_every_steps) is not None:
            stops.append((done // every + 1) * every)
        if self._saving.options.save_every_minutes is not None:
            stops.append(done + self._steps_between_looks(done))
        return min(stops, default=sys.maxsize)

    def _steps_between_looks(self, done: int) -> int:
        """As many as take a moment, by how many there were since the last look at the clock."""
        now = time.monotonic()
        if done > self._looked_after:
            rate = (done - self._looked_after) / max(now - self._looked_at, 1e-3)
            self._between_looks = max(1, int(rate * _SECONDS_BETWEEN_LOOKS))
        self._looked_at, self._looked_after = now, done
        return self._between_looks

    def save(self, progress: Progress, metrics: Mapping[str, float] | None = None) -> None:
        """Write a checkpoint if it is time, or if there are metrics."""
        done = int(progress.state.step)
        if metrics or self.checkpoints.due(done):
            at = (progress.epoch, progress.step, self._options.batch_size, self._examples)
            self.checkpoints.save(
                done,
                progress.state.trained,
                progress.state.opt_state,
                position=Position(*at),
                keys={_KEY: progress.key},
                metrics=metrics,
                metadata={"history": dataclasses.asdict(progress.history)},
            )
