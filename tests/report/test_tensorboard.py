"""The event files, as TensorBoard itself reads them back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_lora import report

Results = dict[str, Any]
MakeResults = Callable[..., Results]


def read_back(folder: Path) -> dict[str, list[tuple[int, float]]]:
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


@pytest.fixture(autouse=True)
def _needs_tensorboardx() -> None:
    pytest.importorskip("tensorboardX")


@pytest.mark.parametrize("phase", ["base", "lora"])
def test_reads_back_exactly(tmp_path: Path, phase: str, make_results: MakeResults) -> None:
    results = make_results()
    report.write_tensorboard(results, tmp_path)
    read = read_back(tmp_path / phase)
    # The file format stores float32.
    assert read["Accuracy/test"] == [
        (epoch, float(np.float32(100 * value)))
        for epoch, value in enumerate(results[phase]["accuracy"], start=1)
    ]
    steps = [epoch * 1563 + end for epoch in range(5) for end in (500, 1000, 1500)]
    assert read["Loss/train"] == [
        (step, float(np.float32(value)))
        for step, value in zip(steps, results[phase]["loss"], strict=True)
    ]
    assert set(read) == {"Accuracy/test", "Loss/train"}


def test_runs_are_base_and_lora(tmp_path: Path, make_results: MakeResults) -> None:
    paths = report.write_tensorboard(make_results(), tmp_path)
    assert [path.parent for path in paths] == [tmp_path / "base", tmp_path / "lora"]
    assert all("tfevents" in path.name for path in paths)  # how TensorBoard finds them


def test_writing_again_replaces(tmp_path: Path, make_results: MakeResults) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mine.txt").write_text("kept")
    report.write_tensorboard(make_results(), tmp_path)
    report.write_tensorboard(make_results(base_epochs=2), tmp_path)
    assert [step for step, _ in read_back(tmp_path / "base")["Accuracy/test"]] == [1, 2]
    assert (tmp_path / "base" / "mine.txt").read_text() == "kept"


def test_epoch_shorter_than_the_window_has_no_loss(
    tmp_path: Path, make_results: MakeResults
) -> None:
    results = make_results(steps_per_epoch=45)
    report.write_tensorboard(results, tmp_path)
    assert set(read_back(tmp_path / "lora")) == {"Accuracy/test"}


def test_number_of_losses_must_fit(tmp_path: Path, make_results: MakeResults) -> None:
    results = make_results()
    results["lora"]["loss"].pop()
    with pytest.raises(ValueError, match=r"lora\.loss: expected 15 values.*got 14"):
        report.write_tensorboard(results, tmp_path)
