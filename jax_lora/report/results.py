"""What the results of a run are: one JSON-able dict, and its curves on the axis of epochs.

Keys marked ``?`` may be absent::

    dataset: str            dataset_source: str         seed: int           command?: str
    config: dict            config_changes?: {option: [preset's value, value used]}
    steps_per_epoch: int    loss_window: int            steps averaged into one training loss
    base: {params, accuracy: [one per epoch, 0..1], loss: [one per full window of each epoch]}
    lora: {trainable_params, total_params, rank, alpha, accuracy, loss, accuracy_before?}
    seconds: {data, base: {compile, run}, lora: {compile, run}, total}
    base_unchanged: bool    is every base weight bitwise what it was before LoRA?
    base_bytes: int         adapter_bytes: int          of the arrays
    base_disk_bytes?: int   adapter_disk_bytes?: int    of the files
    gradient_bytes?: {base, lora}                       of what is trained; else as the arrays
    optimizer_bytes?: {base, lora}                      of the optimizer state, gradients apart
    tables: {base: str, lora: str}                      parameter tables, preformatted
    versions: dict          hardware: dict              notes: [caveat, ...]

A number that is not finite (a run that diverged) is ``None`` in JSON, and a gap everywhere else.
A ``reference`` is a mapping with the same ``steps_per_epoch``, ``loss_window``, ``base`` and
``lora``, plus a ``name``: published values, or an earlier run's results.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

#: The runs of the TensorBoard chart, and how each is written in prose.
PHASES = ("base", "lora")
LABELS = {"base": "base", "lora": "LoRA"}

#: What every curve needs.
CURVE_KEYS = (
    *("dataset", "steps_per_epoch", "loss_window"),
    *(f"{phase}.{key}" for phase in PHASES for key in ("accuracy", "loss")),
)

_TITLES = {"cifar10": "CIFAR-10"}


@dataclasses.dataclass(frozen=True)
class Curve:
    """One phase's measurements, each with its place on the axis of epochs.

    Attributes:
        accuracy: Test accuracy after epoch 1, 2, ..., in percent.
        loss: Mean training loss of each window.
        loss_steps: Optimizer step at the end of each window, counted from the phase's start.
        loss_epochs: The same in epochs.
    """

    accuracy: list[float]
    loss: list[float]
    loss_steps: list[int]
    loss_epochs: list[float]

    @property
    def epochs(self) -> list[int]:
        """The epochs after which `accuracy` was measured: 1, 2, ..."""
        return list(range(1, len(self.accuracy) + 1))


def curve_of(results: Mapping[str, Any], phase: str) -> Curve:
    """The curve of one phase.

    Raises:
        ValueError: If it has another number of losses than of windows.
    """
    accuracy = [100 * as_float(value) for value in results[phase]["accuracy"]]
    loss = [as_float(value) for value in results[phase]["loss"]]
    per_epoch, window = results["steps_per_epoch"], results["loss_window"]
    ends = [
        epoch * per_epoch + end
        for epoch in range(len(accuracy))
        for end in (range(window, per_epoch + 1, window) if window else ())
    ]
    if loss and len(loss) != len(ends):
        raise ValueError(
            f"{phase}.loss: expected {len(ends)} values, one for each full window of {window} "
            f"steps in {len(accuracy)} epochs of {per_epoch}, or none; got {len(loss)}"
        )
    ends = ends[: len(loss)]
    return Curve(accuracy, loss, ends, [end / per_epoch for end in ends])


def has_losses(results: Mapping[str, Any]) -> bool:
    """Whether any phase has a full window of steps in an epoch."""
    return any(results[phase]["loss"] for phase in PHASES)


def check_keys(results: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Check that the results have some keys, written as ``"outer.inner"``.

    Raises:
        ValueError: Names all that are missing.
    """
    missing = []
    for key in keys:
        value: Any = results
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                missing.append(key)
                break
            value = value[part]
    if missing:
        raise ValueError(
            "expected results with the keys that jax_lora.report.results documents, got results "
            f"without {', '.join(missing)}; add them"
        )


def dataset_title(results: Mapping[str, Any]) -> str:
    """The data set as one writes it."""
    return _TITLES.get(results["dataset"], str(results["dataset"]))


def reference_name(reference: Mapping[str, Any] | None) -> str:
    """What the reference is called."""
    return str((reference or {}).get("name", "reference"))


def as_float(value: float | None) -> float:
    """A number of the results, NaN where it is None."""
    return math.nan if value is None else float(value)
