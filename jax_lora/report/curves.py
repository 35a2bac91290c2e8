"""The report's sections on the curves, beside those of a reference where there is one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax_lora.report.results import (
    LABELS,
    PHASES,
    as_float,
    curve_of,
    dataset_title,
    has_losses,
    reference_name,
)
from jax_lora.report.text import number, percent, short, table


def accuracy_section(results: Mapping[str, Any], reference: Mapping[str, Any] | None) -> list[str]:
    """Test accuracy by epoch."""
    name = reference_name(reference)
    head = ["epoch"]
    for phase in PHASES:
        head += [LABELS[phase], *([f"{LABELS[phase]}, {name}"] if reference else [])]
    rows = []
    before = results["lora"].get("accuracy_before")
    if before is not None:
        blank = [""] if reference else []
        rows.append(["before", "", *blank, percent(before), *blank])
    gaps = []
    for epoch in range(1, max(len(results[phase]["accuracy"]) for phase in PHASES) + 1):
        row = [str(epoch)]
        for phase in PHASES:
            value = _get(results[phase]["accuracy"], epoch - 1)
            row.append(percent(value))
            if reference:
                other = _get(reference[phase]["accuracy"], epoch - 1)
                row.append(short(other))
                gaps.append((_gap(value, other), f"{LABELS[phase]}, epoch {epoch}"))
        rows.append(row)
    blocks = ["## Test accuracy", "![Test accuracy by epoch](accuracy.png)", table(head, rows)]
    if not reference:
        blocks.append(
            "There is no comparison here: no reference values were given for "
            f"{dataset_title(results)}."
        )
    elif sentence := _largest(gaps, f"the {name}", 100, "{:.2f} points"):
        precision = reference.get("precision")
        blocks.append(sentence + (f" Of the {name}: {precision}." if precision else ""))
    return blocks


def loss_section(results: Mapping[str, Any], reference: Mapping[str, Any] | None) -> list[str]:
    """Training loss by window of steps."""
    window, per_epoch = results["loss_window"], results["steps_per_epoch"]
    if not has_losses(results):
        return [
            "## Training loss",
            (
                f"No loss was kept: the run has no full window of {window:,} steps in an epoch of "
                f"{per_epoch:,}."
            ),
        ]
    curves = {phase: curve_of(results, phase) for phase in PHASES}
    name = reference_name(reference)
    keys = ("loss_window", "steps_per_epoch")
    same = reference is not None and all(reference[key] == results[key] for key in keys)
    others = {phase: curve_of(reference, phase) for phase in PHASES} if reference and same else {}
    head = ["epoch", "step"]
    for phase in PHASES:
        head += [LABELS[phase], *([f"{LABELS[phase]}, {name}"] if others else [])]
    rows, gaps = [], []
    longest = max(curves.values(), key=lambda curve: len(curve.loss_steps))
    for index, step in enumerate(longest.loss_steps):
        epoch, within = divmod(step - 1, per_epoch)
        row = [str(epoch + 1), f"{within + 1:,}"]
        for phase in PHASES:
            value = _get(curves[phase].loss, index)
            row.append(number(value, ".3f"))
            if others:
                other = _get(others[phase].loss, index)
                row.append(number(other, ".3f"))
                where = f"{LABELS[phase]}, epoch {epoch + 1}, step {within + 1:,}"
                gaps.append((_gap(value, other), where))
        rows.append(row)
    blocks = [
        "## Training loss",
        f"Each value is the mean of {window:,} steps that end at the step named.",
        "![Training loss by epoch](loss.png)",
        table(head, rows),
    ]
    if reference is not None and not same:
        blocks.append(
            f"The {name}'s losses are not set beside these: they are means of "
            f"{reference['loss_window']:,} steps in epochs of {reference['steps_per_epoch']:,}."
        )
    elif sentence := _largest(gaps, f"the {name}", 1, "{:.3f}"):
        blocks.append(sentence)
    return blocks


def last(values: Sequence[float]) -> float | None:
    """The last value, None where there is none."""
    return values[-1] if values else None


def _get(values: Sequence[float], index: int) -> float | None:
    return values[index] if index < len(values) else None


def _gap(value: float | None, other: float | None) -> float | None:
    gap = abs(as_float(value) - as_float(other))
    return gap if math.isfinite(gap) else None


def _largest(gaps: Iterable[tuple[float | None, str]], name: str, factor: float, spec: str) -> str:
    """Say where a comparison is furthest off; nothing where there was nothing to compare."""
    known = [(gap, where) for gap, where in gaps if gap is not None]
    if not known:
        return ""
    gap, where = max(known)
    return f"Largest difference from {name}: {spec.format(factor * gap)} ({where})."
