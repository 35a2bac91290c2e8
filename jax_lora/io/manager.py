"""Checkpoints of a training: written beside it, a few kept, and read again to go on with it."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import sys
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self

import jax
import numpy as np

from jax_lora.config import LoraConfig
from jax_lora.errors import CheckpointError, ConfigError, near_misses
from jax_lora.io import files, folders, resuming
from jax_lora.io.resuming import Position, Restored
from jax_lora.io.worker import Worker, snapshot
from jax_lora.io.writer import Writer


class Checkpoints:
    """A folder with the checkpoints of one training, by the number of steps done.

    Each is the folder ``<folder>/<step>``, which orbax writes under another name and renames at the
    end: it is whole or absent, also when the process is killed. It is what `save_adapter` (or
    `save_params`) writes, so `load_adapter` takes the adapter out of it without the rest, and an
    orbax item ``training`` with the optimizer's state and the keys.

    `save` notes what the arrays hold, and returns; a thread fetches, checks and writes it. What
    fails there is raised by the next call of `save`, `wait` or `close`, as one error that names the
    last good step. Leaving the ``with`` block closes it; a program that ends without waits for the
    last save too, and prints what failed.

    Nothing is written, deleted or locked before the first `save` or `claim`. One process trains
    into a folder at a time.

    Args:
        folder: The folder; it is made when the first checkpoint is written.
        base: The parameters beside the adapter: their fingerprint goes into every checkpoint, and
            restored arrays are spread over devices as `adapter_shardings` says.
        config: The configuration of the adapter.
        run: What has to be the same when the training goes on, as JSON-able data by name, such as
            the learning rate, the batch size and the data set.
        keep: How many of the last checkpoints are kept; older ones are deleted.
        best: The name of a metric; the checkpoint where it is best is kept as well.
        mode: Whether ``"max"`` or ``"min"`` is best.
        every_steps: `due` says yes after so many steps.
        every_minutes: `due` says yes after so many minutes.

    Raises:
        ConfigError: Names every option that is out of range.

    Example:
        >>> import optax, tempfile, jax.numpy as jnp, jax_lora as jl
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
        >>> plan = jl.plan(lambda p, x: x @ p["w"], params, x, config=jl.LoraConfig(rank=2))
        >>> adapter = jl.init(jax.random.key(0), params, plan)
        >>> opt_state = jl.optim.lora_optimizer(optax.adam(1e-3)).init(adapter)
        >>> folder = tempfile.TemporaryDirectory()
        >>> with jl.io.Checkpoints(folder.name, base=params, config=plan.config, keep=2) as saved:
        ...     for step in (10, 20, 30):
        ...         saved.save(step, adapter, opt_state, metadata={"loss": [2.5, 1.5]})
        >>> saved.steps
        [20, 30]
        >>> found = saved.restore(adapter, opt_state)
        >>> found.step, found.metadata
        (30, {'loss': [2.5, 1.5]})
        >>> folder.cleanup()
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        base: Any = None,
        config: LoraConfig | None = None,
        run: Mapping[str, Any] | None = None,
        keep: int = 3,
        best: str | None = None,
        mode: folders.Mode = "max",
        every_steps: int | None = None,
        every_minutes: float | None = None,
    ):
        _check_options(keep, mode, every_steps, every_minutes)
        self.folder = Path(folder).expanduser().absolute()
        self._run = resuming.Run(base, config, run or {})
        self._writer = Writer(self.folder, self._run, keep, best, mode)
        self._every_steps, self._every_minutes = every_steps, every_minutes
        self._worker = Worker("jax_lora checkpoints")
        self._lock: IO[bytes] | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None
        #: The step that the training goes on from, then the last one that `save` was called with.
        self._last: int | None = None
        self._saved_at = time.monotonic()
        #: That of the training whose arrays have been checked.
        self._structure: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except CheckpointError as failed:
            if error is None:
                raise
            error.add_note(str(failed))

    @property
    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, from the first to the last."""
        return folders.steps_in(self.folder)

    @property
    def best(self) -> int | None:
        """The step whose metric is best; None if none has it."""
        return self._writer.best()

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / str(step)

    @property
    def busy(self) -> bool:
        """Whether a save is not whole yet."""
        return self._worker.busy

    def due(self, step: int) -> bool:
        """Whether to save now: it is time, and the save before is done, so that nothing waits.

        It is time when a multiple of ``every_steps`` was reached since the last save, or
        ``every_minutes`` have passed since it began.

        Args:
            step: The number of steps done.
        """
        last = self._last or 0
        if self.busy or step <= last:
            return False
        if self._every_steps is not None and step // self._every_steps > last // self._every_steps:
            return True
        passed = time.monotonic() - self._saved_at
        return self._every_minutes is not None and passed >= 60 * self._every_minutes

    def claim(self) -> None:
        """Take the folder for this training, and remove what killed processes left half done.

        The first `save` does it; before a long training it is better known at once.

        Raises:
            CheckpointError: Another process trains into it, it cannot be written, or it holds the
                checkpoints of a training that this one does not go on with.
        """
        if self._lock is not None:
            return
        if self._last is None and (there := self.steps):
            raise CheckpointError(
                f"{self.folder}: expected no checkpoints of another training, found the steps "
                f"{', '.join(map(str, there))}; restore one of them to go on, or choose another "
                "folder"
            )
        files.check_path(self.folder)
        try:
            self._lock = folders.lock(self.folder)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {_last_good(self._writer.whole)}") from error
        self._finalizer = weakref.finalize(self, _abandon, self._worker, self._lock)
        folders.clear_leftovers(self.folder)
        self._writer.look()

    def save(
        self,
        step: int,
        trained: Any,
        opt_state: Any,
        *,
        position: Position | None = None,
        keys: Mapping[str, jax.Array] | None = None,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a checkpoint while the training goes on.

        The arrays may be donated to the next step. It waits only for the save before it, if that
        is not done yet. Older checkpoints are deleted after this one is whole. Those of later
        steps, which are there after a restore of an earlier one, are set aside: renamed to
        ``<step>.aside``.

        Args:
            step: The number of steps done, more than at the last save.
            trained: The adapter, or the parameters.
            opt_state: The optimizer's state.
            position: Where in the data it is.
            keys: The PRNG keys that the training goes on with, by name.
            metrics: Numbers by name, among them the one that ``best`` names; or none, as when a
                save is not after an evaluation.
            metadata: JSON-able facts, such as the losses until now.

        Raises:
            CheckpointError: What the save before it failed with; or a leaf is no array, the step is
                not after the last, or as `claim`.
            AdapterError: The adapter does not fit the base.
            ConfigError: Metrics without the one that ``best`` names.
        """
        step = _checked_step(self.folder, step)
        if self._last is not None and step <= self._last:
            raise CheckpointError(
                f"{self.folder}: expected a step after {self._last}, the last one, got {step}"
            )
        numbers = self._check_metrics(metrics or {})
        state = {
            "step": step,
            "position": dataclasses.asdict(position) if position else None,
            "metrics": numbers,
        }
        facts = {
            "state": files.plain("state", state),
            "metadata": files.plain("metadata", metadata or {}),
        }
        training = (trained, opt_state, dict(keys or {}))
        structure = jax.tree.structure(training)
        if self._structure is None or structure != self._structure:
            self._run.pack(self.path(step), *training)  # its errors now, not at the next call
            self._structure = structure
        self.claim()
        self.wait()
        now = snapshot(training)
        self._worker.start(functools.partial(self._writer.write, step, now, facts))
        self._last, self._saved_at = step, time.monotonic()

    def wait(self) -> None:
        """Wait until the last save is whole.

        Raises:
            CheckpointError: It failed; names the last good step.
        """
        try:
            self._worker.wait()
        except CheckpointError as error:
            self._last = self._writer.whole
            raise CheckpointError(f"{error}; {_last_good(self._writer.whole)}") from error

    def close(self) -> None:
        """Wait for the last save, and leave the folder to others.

        Raises:
            CheckpointError: The last save failed; names the last good step.
        """
        try:
            self.wait()
        finally:
            if self._finalizer is not None:
                self._finalizer()
                self._lock = self._finalizer = None

    def restore(
        self, trained: Any, opt_state: Any, *, step: int | None = None, fall_back: bool = False
    ) -> Restored:
        """Read a checkpoint to go on with its training.

        Nothing in the folder is changed by it. Arrays come on the default device; if the base (or
        ``trained`` itself, when there is no base) is spread over a mesh of devices, on these: the
        adapter's as `adapter_shardings` says, the optimizer's state like the factors it belongs to,
        all else whole on every device.

        Args:
            trained: An adapter, or parameters, of the structure that is expected: a fresh one, or
                its shapes, as of ``jax.eval_shape``.
            opt_state: The state of the optimizer for it, or its shapes.
            step: The step; by default the last one.
            fall_back: Take the last good step if that one is damaged.

        Raises:
            CheckpointError: There is none; or it is damaged, which names the last good step; or it
                is of another run, optimizer or configuration, which names all that differs.
            AdapterError: The base is another one; names the parameters that differ.
        """
        self.wait()
        there = self.steps
        if step is not None and step not in there:
            near = near_misses(str(step), map(str, there))
            raise CheckpointError(f"{self.folder}: no checkpoint of step {step}; {near}")
        if not there:
            raise CheckpointError(f"{self.folder}: expected checkpoints of a training, found none")
        candidates = [k for k in reversed(there) if step is None or k <= step]
        found, (document, items) = self._first_good(candidates, fall_back)
        restored = self._run.unpack(self.path(found), document, items, trained, opt_state)
        self._last = self._writer.whole = found
        return restored

    def _first_good(
        self, candidates: list[int], fall_back: bool
    ) -> tuple[int, tuple[dict[str, Any], dict[str, Any]]]:
        """The first of these steps that can be read, if it may be another than the very first."""
        first_error = None
        for step in candidates:
            try:
                found = resuming.read(self.path(step))
            except CheckpointError as error:
                first_error = first_error or error
                continue
            if first_error is None or fall_back:
                return step, found
            raise CheckpointError(
                f"{first_error}; {_last_good(step)}: restore(step={step}), or "
                "restore(fall_back=True), or --fall-back of a script, goes on from there"
            ) from first_error
        assert first_error is not None
        raise CheckpointError(f"{first_error}; {_last_good(None)}") from first_error

    def _check_metrics(self, metrics: Mapping[str, float]) -> dict[str, float | None]:
        best = self._writer.metric
        if metrics and best is not None and best not in metrics:
            raise ConfigError(
                f"expected metrics with {best!r}, by which the best is kept, got "
                f"{', '.join(map(repr, metrics))}; pass it, or no metrics at all"
            )
        if odd := [f"{name!r}: {x!r}" for name, x in metrics.items() if not _is_number(x)]:
            raise ConfigError(f"expected numbers as metrics, got {', '.join(odd)}")
        numbers = {name: float(x) for name, x in metrics.items()}
        return {name: x if math.isfinite(x) else None for name, x in numbers.items()}


def _check_options(
    keep: int, mode: str, every_steps: int | None, every_minutes: float | None
) -> None:
    problems = []
    if not _is_count(keep):
        problems.append(f"keep of at least 1, got {keep!r}")
    if mode not in ("min", "max"):
        problems.append(f"mode 'min' or 'max', got {mode!r}")
    if every_steps is not None and not _is_count(every_steps):
        problems.append(f"every_steps of at least 1, got {every_steps!r}")
    if every_minutes is not None and not (every_minutes > 0 and math.isfinite(every_minutes)):
        problems.append(f"every_minutes above 0, got {every_minutes!r}")
    if problems:
        raise ConfigError("expected " + "; ".join(problems))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(x: Any) -> bool:
    return np.ndim(x) == 0 and np.issubdtype(np.asarray(x).dtype, np.number)


def _checked_step(folder: Path, step: Any) -> int:
    """A number of steps as Python's, whichever library it is of."""
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if number < 0:
        raise CheckpointError(f"{folder}: expected a number of steps, got {step!r}")
    return number


def _last_good(step: int | None) -> str:
    return "there is no good step" if step is None else f"the last good step is {step}"


def _abandon(worker: Worker, lock: IO[bytes]) -> None:
    """The end of checkpoints, also of those that nobody closed and nobody can ask any more."""
    try:
        worker.wait()
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
    lock.close()
