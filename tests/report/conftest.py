"""Made-up results, of the shape and size of the real ones."""

from collections.abc import Callable
from typing import Any

import pytest

Results = dict[str, Any]


@pytest.fixture
def make_results() -> Callable[..., Results]:
    """From the numbers of epochs and steps to results; no two of their numbers are equal."""
    return _make_results


def _make_results(
    base_epochs: int = 5,
    lora_epochs: int = 5,
    steps_per_epoch: int = 1563,
    loss_window: int = 500,
    optional: bool = True,
) -> Results:
    """Made-up results of the shape and size of the real ones; no two numbers are equal."""

    def losses(epochs: int, start: float, end: float) -> list[float]:
        count = epochs * (steps_per_epoch // loss_window)
        return [end + (start - end) / (1 + 0.3 * index) for index in range(count)]

    results: Results = {
        "dataset": "cifar10",
        "dataset_source": "made up for a test",
        "seed": 17,
        "config": {"rank": 32, "train": {"batch_size": 64, "learning_rate": 0.001}},
        "steps_per_epoch": steps_per_epoch,
        "loss_window": loss_window,
        "base": {
            "params": 411_146,
            "accuracy": [0.5203 - 0.1271 / (1 + epoch) for epoch in range(base_epochs)],
            "loss": losses(base_epochs, 2.1437, 1.3011),
        },
        "lora": {
            "trainable_params": 115_008,
            "total_params": 526_154,
            "rank": 32,
            "alpha": 1.0,
            "accuracy": [0.5044 + 0.0021 * epoch for epoch in range(lora_epochs)],
            "loss": losses(lora_epochs, 1.3476, 1.2718),
        },
        "seconds": {
            "data": 1.26,
            "base": {"compile": 0.91, "run": 7.62},
            "lora": {"compile": 1.13, "run": 8.47},
            "total": 19.95,
        },
        "base_unchanged": True,
        "adapter_bytes": 460_032,
        "base_bytes": 1_644_584,
        "tables": {
            "base": "layer  parameters\nl1  393,344",
            "lora": "layer  parameters\nl1.a  98,304",
        },
        "versions": {"python": "3.11.7", "jax": "0.10.2"},
        "hardware": {"platform": "cpu", "device": "a processor", "devices": 1, "cores": 2},
        "notes": ["One run only.", "The data is a copy."],
    }
    if optional:
        results |= {
            "command": "python -m something --seed 17",
            "config_changes": {"train.batch_size": [32, 64]},
            "base_disk_bytes": 1_650_113,
            "adapter_disk_bytes": 470_227,
            "optimizer_bytes": {"base": 1_644_588, "lora": 460_036},
        }
        results["lora"]["accuracy_before"] = 0.5031
    return results
