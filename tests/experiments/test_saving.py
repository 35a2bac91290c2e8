"""A phase that is interrupted and goes on ends as one that was not, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.experiments import epochs, saving
from jax_lora.experiments.fit import Phase, fit
from jax_lora.experiments.options import CheckpointOptions, TrainOptions
from jax_lora.experiments.saving import History, Saver, Saving
from jax_lora.io import folders
from tests.experiments.small import DATASET, predict, start

STEPS, EPOCHS = 7, 3


class PowerCutError(Exception):
    """Ends a run at once."""


class Run:
    """A phase with noise in each step, which notes the steps it does and may end before one."""

    def __init__(self, folder: Path | None, before: int | None = None, **options: Any):
        train = {"batch_size": 8, "learning_rate": 0.1, "num_devices": 1, "epochs": EPOCHS}
        names = {field for field in TrainOptions.__dataclass_fields__ if field in options}
        chosen = TrainOptions(**train | {name: options.pop(name) for name in names})
        self.parts: list[tuple[int, int]] = []
        self.traces = 0
        self.phase: Phase | None = None
        kept = None
        if folder is not None:
            options = {"save_every_steps": 2, "resume": True} | options
            kept = Saving(folder, CheckpointOptions(**options), {"batch_size": chosen.batch_size})

        def watch(start: int, stop: int) -> None:
            if before is not None and start >= before:
                raise PowerCutError
            self.parts.append((start, stop))

        try:
            self.phase = fit(
                predict,
                start(),
                None,
                chosen.optimizer(),
                DATASET,
                chosen,
                jax.random.key(0),
                "a phase",
                noisy=self._noisy,
                saving=kept,
                watch=watch,
            )
        except PowerCutError:
            assert folder is not None
            self.whole = max(folders.steps_in(folder), default=0)

    def _noisy(self, params: Any, frozen: Any, images: jax.Array, key: jax.Array) -> Any:
        self.traces += 1
        kept = jax.random.bernoulli(key, 0.8, images.shape)
        return predict(params, frozen, jnp.where(kept, images, 0))


def assert_same(found: Phase | None, expected: Phase | None) -> None:
    assert found is not None
    assert expected is not None
    leaves = [
        jax.tree.leaves((phase.state.trained, phase.state.opt_state)) for phase in (found, expected)
    ]
    for one, other in zip(*leaves, strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    for name in ("accuracy_before", "accuracy", "loss", "loss_window", "steps_per_epoch"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.state.step == expected.state.step == EPOCHS * STEPS


@pytest.fixture(scope="module")
def whole() -> Run:
    return Run(None)


@pytest.fixture(autouse=True)
def each_save_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that none is left out because the one before is not done."""
    save = jl.io.Checkpoints.save

    def save_and_wait(self: jl.io.Checkpoints, *args: Any, **options: Any) -> None:
        save(self, *args, **options)
        self.wait()

    monkeypatch.setattr(jl.io.Checkpoints, "save", save_and_wait)


def test_without_checkpoints_an_epoch_is_one_part(whole: Run) -> None:
    assert whole.parts == [(0, 7), (7, 14), (14, 21)]
    assert whole.phase is not None
    assert len(set(whole.phase.loss)) == EPOCHS * 3


def test_saving_changes_nothing_and_compiles_nothing(tmp_path: Path, whole: Run) -> None:
    run = Run(tmp_path)
    assert_same(run.phase, whole.phase)
    assert run.traces == whole.traces
    assert [stop for _, stop in run.parts] == [2, 4, 6, 7, 8, 10, 12, 14, 16, 18, 20, 21]
    assert folders.steps_in(tmp_path)[-1] == EPOCHS * STEPS
    assert run.phase is not None
    assert run.phase.resumed_at == []


@pytest.mark.parametrize(
    ("how", "ends", "whole_saves"),
    [
        ("jit", (1, 5, 11), (2, 6, 12)),
        ("pmap", (9,), (10,)),
        # Fed in chunks of three steps, so two steps are three.
        ("stream", (9,), (10,)),
    ],
)
def test_interrupted_in_the_middle_of_epochs(
    tmp_path: Path,
    whole: Run,
    how: str,
    ends: tuple[int, ...],
    whole_saves: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {"parallel": "jit" if how == "stream" else how}
    if how == "stream":
        monkeypatch.setattr(epochs, "CHUNK", 3)
        monkeypatch.setattr(epochs.Streamed, "grain", 3)
        options["stream"] = True
    expected = whole if how == "jit" else Run(None, **options)
    begun = 0
    for before, kept in zip(ends, whole_saves, strict=True):
        run = Run(tmp_path, before, **options)
        assert run.parts[0][0] == begun
        assert run.whole == run.parts[-1][1] == kept
        begun = kept
    assert begun % STEPS, "expected to be in the middle of an epoch"
    last = Run(tmp_path, **options)
    assert last.parts[0][0] == begun
    assert_same(last.phase, expected.phase)
    assert last.phase is not None
    assert last.phase.resumed_at == list(whole_saves)


def test_epochs_may_grow_and_not_shrink(tmp_path: Path, whole: Run) -> None:
    Run(tmp_path, epochs=1)
    grown = Run(tmp_path)
    assert grown.parts[0][0] == STEPS
    assert_same(grown.phase, whole.phase)
    again = Run(tmp_path)
    assert again.parts == []
    assert_same(again.phase, whole.phase)
    assert again.phase is not None
    assert again.phase.resumed_at == [STEPS]
    with pytest.raises(jl.ConfigError, match=r"expected --epochs of at least 3, .* got 2"):
        Run(tmp_path, epochs=2)


def test_another_run_is_refused(tmp_path: Path) -> None:
    Run(tmp_path, before=5)
    with pytest.raises(jl.CheckpointError, match="batch_size: saved 8, now 10"):
        Run(tmp_path, batch_size=10)
    with pytest.raises(jl.CheckpointError, match="optimizer state 0/trace: only saved, an array"):
        Run(tmp_path, momentum=0.0)
    with pytest.raises(jl.ConfigError, match="pass --resume to go on, or choose another folder"):
        Run(tmp_path, resume=False)


# When an array cannot be read, orbax closes its event loop while others are still being read.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint(tmp_path: Path, whole: Run) -> None:
    run = Run(tmp_path, before=12, keep=3)
    shutil.rmtree(tmp_path / str(run.whole) / "arrays" / "d")
    with pytest.raises(jl.CheckpointError, match="the last good step is"):
        Run(tmp_path)
    fallen = Run(tmp_path, fall_back=True)
    assert 0 < fallen.parts[0][0] < run.whole
    assert_same(fallen.phase, whole.phase)
    assert (tmp_path / f"{run.whole}.aside").is_dir()


def test_the_best_is_kept(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=1, keep_best="loss", save_every_steps=None, learning_rate=3.0)
    assert run.phase is not None
    last_losses = {STEPS * k: run.phase.loss[3 * k - 1] for k in (1, 2, 3)}
    best = min(last_losses, key=lambda step: last_losses[step])
    assert best < EPOCHS * STEPS, "expected the best not to be the last"
    assert folders.steps_in(tmp_path) == [best, EPOCHS * STEPS]


def test_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look every two seconds, by the pace until then."""
    now = [0.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    options = CheckpointOptions(save_every_minutes=1.0)
    with Saver(Saving(tmp_path, options, {}), None, TrainOptions(), 50) as saver:
        assert saver.next_stop(0) == 32
        now[0] = 0.5
        assert saver.next_stop(32) == 32 + 128
        now[0] = 100.0
        assert saver.next_stop(160) == 161 + 1
    every = CheckpointOptions(save_every_minutes=1.0, save_every_steps=10)
    with Saver(Saving(tmp_path, every, {}), None, TrainOptions(), 50) as saver:
        assert [saver.next_stop(done) for done in (0, 9, 10)] == [10, 10, 20]


def test_windows_of_losses_do_not_depend_on_the_parts() -> None:
    losses = np.random.default_rng(0).normal(size=23).astype(np.float32)
    expected = [float(losses[k : k + 5].mean()) for k in (0, 5, 10, 15)]
    for parts in ([losses], np.split(losses, [1, 2, 9]), np.split(losses, range(1, 23))):
        history = History(window=5)
        for part in parts:
            history.add(part)
        assert history.loss == expected
        history.end_epoch(0.5)
        assert (history.pending, history.accuracy) == ([], [0.5])
