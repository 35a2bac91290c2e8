"""Tasks made from the digits, switched by merging and by requests."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.data import load
from jax_lora.experiments.switching import TASKS, SwitchTasks, of_task, run_switch
from jax_lora.models import MLP

pytest.importorskip("sklearn")
# A context manager would hide what is tested; orbax closes its threads when collected.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def options(tmp_path: Path) -> SwitchTasks:
    """With a random base, which the adapters have to teach everything."""
    model = MLP((16, 10))
    params = model.init(jax.random.key(0), np.zeros((1, 64), np.float32))
    metadata = {"features": [16, 10], "image_shape": [8, 8, 1], "max_value": 16}
    jl.io.save_params(tmp_path / "base", params, metadata | {"dataset": "digits"})
    return SwitchTasks(
        base=tmp_path / "base",
        adapters=tmp_path / "tasks",
        rank=8,
        epochs=5,
        batch_size=32,
        learning_rate=0.03,
        num_devices=1,
        requests=40,
    )


def test_what_is_trained_is_switched(
    options: SwitchTasks, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run_switch(options)
    merged, served = results["merged"], results["served"]
    assert set(merged["accuracy"]) == set(served["accuracy"]) == set(TASKS)
    for name in TASKS:
        assert served["accuracy"][name] > 0.5  # a tenth by chance
        # Rounded elsewhere: an image on the edge between two classes may turn.
        assert abs(merged["accuracy"][name] - served["accuracy"][name]) <= 1 / 40
    assert served["loads"] == 3
    assert served["largest_difference"] < 1e-5
    assert merged["largest_change"] < 1e-5
    out = capsys.readouterr().out
    assert all(word in out for word in (*TASKS, "ms for a switch", "3 adapters loaded"))

    # Once more with what is there, two of them exchanged: nothing is trained, and it shows.
    (options.adapters / "upright").rename(options.adapters / "kept")
    (options.adapters / "turned").rename(options.adapters / "upright")
    (options.adapters / "kept").rename(options.adapters / "turned")
    exchanged = run_switch(options)["served"]["accuracy"]
    assert exchanged["negative"] == served["accuracy"]["negative"]
    for name in ("upright", "turned"):
        assert exchanged[name] < served["accuracy"][name] - 0.2


def test_the_tasks() -> None:
    digits = load("digits")
    before = digits.test.images
    assert (of_task(digits, "upright").test.images == before).all()
    turned = of_task(digits, "turned").test.images
    assert (turned[:, 0] == before[:, :, -1]).all()  # the right column is on top
    negative = of_task(digits, "negative").test.images
    assert negative.dtype == np.uint8
    assert (negative.astype(int) + before == digits.max_value).all()
