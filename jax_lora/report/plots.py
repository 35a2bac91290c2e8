"""The curves as pictures, the base blue and LoRA pink."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_lora.report.charts import INK, style_axes
from jax_lora.report.extras import import_extra
from jax_lora.report.results import (
    CURVE_KEYS,
    LABELS,
    PHASES,
    check_keys,
    curve_of,
    dataset_title,
    has_losses,
    reference_name,
)

COLOURS = {"base": "#0072c6", "lora": "#ec4899"}

_Line = tuple[Sequence[float], Sequence[float]]


def write_plots(
    results: Mapping[str, Any], folder: str | Path, reference: Mapping[str, Any] | None = None
) -> list[Path]:
    """Draw ``accuracy.png`` and ``loss.png``: both phases from epoch 1, base blue and LoRA pink.

    Args:
        results: The results of a run.
        folder: Where to put the pictures; made if need be.
        reference: Values to draw beside them, dashed and hollow in the same colours.

    Returns:
        The pictures drawn. There is no ``loss.png`` where an epoch is shorter than a loss window.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the results lack a key, or have another number of losses than of windows.
    """
    check_keys(results, CURVE_KEYS)
    curves = {phase: curve_of(results, phase) for phase in PHASES}
    others = {phase: curve_of(reference, phase) for phase in PHASES} if reference else {}
    where = f"{dataset_title(results)}, LoRA rank {results['lora'].get('rank', '?')}"
    window = results["loss_window"]

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    note = f"dashed, hollow: the {reference_name(reference)}'s values" if reference else ""
    paths = [folder / "accuracy.png"]
    _draw(
        paths[0],
        title=f"Test accuracy: {where}",
        y_label="test accuracy (%)",
        value_label="{:.2f} %",
        lines={phase: (curve.epochs, curve.accuracy) for phase, curve in curves.items()},
        dashed={phase: (curve.epochs, curve.accuracy) for phase, curve in others.items()},
        note=note,
    )
    if has_losses(results):
        if reference and reference["loss_window"] != window:
            note += f", means of {reference['loss_window']:,} steps"
        paths.append(folder / "loss.png")
        _draw(
            paths[1],
            title=f"Training loss: {where}",
            y_label=f"training loss (mean of {window:,} step{'s' * (window != 1)})",
            value_label="{:.3f}",
            lines={phase: (curve.loss_epochs, curve.loss) for phase, curve in curves.items()},
            dashed={phase: (curve.loss_epochs, curve.loss) for phase, curve in others.items()},
            note=note,
        )
    return paths


def _draw(
    path: Path,
    *,
    title: str,
    y_label: str,
    value_label: str,
    lines: Mapping[str, _Line],
    dashed: Mapping[str, _Line],
    note: str,
) -> None:
    """Draw one 1200 x 750 picture without pyplot or rcParams, so that nothing global is touched.

    Args:
        path: The PNG to write.
        title: What is drawn, of which run.
        y_label: The quantity and its unit.
        value_label: Format of a line's last value.
        lines: The run's points by phase.
        dashed: The reference's points by phase; empty without one.
        note: What the dashed lines are.
    """
    figure_module = import_extra("matplotlib.figure")
    agg = import_extra("matplotlib.backends.backend_agg")
    ticker = import_extra("matplotlib.ticker")

    figure = figure_module.Figure(figsize=(8, 5), dpi=150, facecolor="white")
    canvas = agg.FigureCanvasAgg(figure)
    axes = figure.add_axes((0.085, 0.12, 0.785, 0.75), facecolor="white")
    for phase, (xs, ys) in dashed.items():
        # Rings wide enough to be seen around a point of the run that lies on them.
        ring = {"marker": "o", "markersize": 8, "markerfacecolor": "white"}
        dashes = {"linestyle": (0, (4, 3)), "linewidth": 1.1}
        axes.plot(xs, ys, color=COLOURS[phase], alpha=0.75, **dashes, **ring)
    for phase, (xs, ys) in lines.items():
        dot = "o" if len(xs) <= 60 else ""
        axes.plot(xs, ys, color=COLOURS[phase], linewidth=2.2, marker=dot, markersize=5, zorder=3)

    # Room at the edges; a single point still gets an axis around it.
    everything = [*lines.values(), *dashed.values()]
    last = max((x for xs, _ in everything for x in xs), default=1)
    first = min((x for xs, _ in everything for x in xs), default=1)
    axes.set_xlim(min(first, 1) - 0.04 * max(last, 2), max(last, 2) * 1.03)
    values = [y for _, ys in everything for y in ys if math.isfinite(y)] or [0.0, 1.0]
    low, high = min(values), max(values)
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - pad, high + pad)

    # Each line carries its name and last value at its right end, moved apart where they would meet.
    ends = []
    for phase, (xs, ys) in lines.items():
        finite = [(y, x) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
        if finite:
            ends.append((*finite[-1], phase))
    ends.sort()
    heights = [value for value, _, _ in ends]
    apart = 0.115 * (high - low + 2 * pad)
    beside = len(ends) == 2 and abs(ends[1][1] - ends[0][1]) < 0.15 * last
    if beside and heights[1] - heights[0] < apart:
        middle = sum(heights) / 2
        heights = [middle - apart / 2, middle + apart / 2]
    for height, (value, x, phase) in zip(heights, ends, strict=True):
        axes.annotate(
            f"{LABELS[phase]}\n{value_label.format(value)}",
            xy=(x, height),
            xytext=(12, 0),
            textcoords="offset points",
            color=COLOURS[phase],
            fontsize=11,
            fontweight="bold",
            verticalalignment="center",
            linespacing=1.1,
            annotation_clip=False,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
            zorder=2.5,  # over the dashed lines, under the run's own
        )

    figure.text(0.085, 0.94, title, color=INK, fontsize=14, fontweight="bold", va="center")
    figure.text(0.085, 0.897, note, color="#666666", fontsize=10, va="center")
    axes.set_xlabel("epoch of the phase", color=INK, fontsize=11)
    axes.set_ylabel(y_label, color=INK, fontsize=11)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    style_axes(axes)
    canvas.print_png(str(path))
