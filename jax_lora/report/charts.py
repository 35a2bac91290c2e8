"""Charts of any numbers: panels of lines or bars side by side, and matrices as fields of colour.

Drawn without pyplot or rcParams, so that nothing global is touched; the legend stands below the
panels, where it hides nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_lora.report.extras import import_extra

INK, PALE, EDGE = "#333333", "#d9d9d9", "#999999"
#: Told apart by people with any colour vision (Okabe and Ito 2008), but for the first two.
CYCLE = ("#0072c6", "#ec4899", "#009e73", "#e69f00", "#56b4e9", "#d55e00", "#8f6fc1", "#666666")
_DPI, _HEIGHT = 110, 4.2


@dataclasses.dataclass(frozen=True)
class Line:
    """Points in a panel; what is not finite is a gap.

    Attributes:
        label: Its name in the legend; without one it is not in there.
        x: Where.
        y: The values.
        spread: Half the length of each error bar, if there are any.
        colour: As ``#rrggbb``; by default the next of the panel's.
        style: Joined points, a dashed line without points, or points alone.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None
    colour: str | None = None
    style: str = "line"


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        x_label: The quantity along x and its unit.
        y_label: The same along y.
        lines: What is drawn.
        title: What stands above it.
        levels: Horizontal lines by name, the same colour for the same name in every panel.
        log_x: Whether x is logarithmic, to the base 2.
        log_y: Whether y is logarithmic.
        ticks: What stands at some places along x, instead of numbers.
    """

    x_label: str
    y_label: str
    lines: Sequence[Line]
    title: str = ""
    levels: Mapping[str, float] = dataclasses.field(default_factory=dict)
    log_x: bool = False
    log_y: bool = False
    ticks: Mapping[float, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Numbers in rows and columns.

    Attributes:
        values: The rows.
        rows: Their names, or none.
        columns: The names of the columns, or none.
        title: What stands above it.
        x_label: What the columns are.
        y_label: What the rows are.
        cell: The format of a number in its cell; without one it is a colour alone.
    """

    values: Sequence[Sequence[float]]
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    title: str = ""
    x_label: str = ""
    y_label: str = ""
    cell: str = ""


def draw_panels(path: str | Path, panels: Sequence[Panel], title: str, note: str = "") -> Path:
    """Draw panels side by side, with one legend for all.

    Args:
        path: The PNG to write; its folder is made if need be.
        panels: From left to right.
        title: What is drawn.
        note: What a reader has to know beside it, below the title.

    Returns:
        The path.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure, canvas = _figure(5.0 * len(panels), _HEIGHT + 0.6, title, note)
    handles: dict[str, Any] = {}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, panel, handles)
    if handles:
        columns = min(len(handles), 2 + 2 * len(panels))
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=9,
            labelcolor=INK,
        )
    return _print(canvas, path)


def draw_matrices(
    path: str | Path,
    matrices: Sequence[Matrix],
    title: str,
    note: str = "",
    span: tuple[float, float] | None = None,
    bar_label: str = "",
) -> Path:
    """Draw matrices side by side, all on one scale of colours.

    Args:
        path: The PNG to write; its folder is made if need be.
        matrices: From left to right.
        title: What is drawn.
        note: What a reader has to know beside it, below the title.
        span: The values of the darkest and of the brightest colour; by default those there are.
        bar_label: What the colours mean.

    Returns:
        The path.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    each = 3.4 if len(matrices) > 1 else 6.5
    figure, canvas = _figure(each * len(matrices) + 0.8, _HEIGHT, title, note)
    values = [value for m in matrices for row in m.values for value in row if math.isfinite(value)]
    low, high = span or (min(values), max(values))
    subplots = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axes, matrix in zip(subplots, matrices, strict=True):
        height, width = len(matrix.values), len(matrix.values[0])
        # Rows and columns without names are counted from 1.
        counted = None if matrix.rows else (0.5, width + 0.5, height + 0.5, 0.5)
        look = {"cmap": "viridis", "aspect": "auto", "interpolation": "nearest"}
        image = axes.imshow(matrix.values, vmin=low, vmax=high, extent=counted, **look)
        axes.set_title(matrix.title, color=INK, fontsize=10)
        axes.set_xlabel(matrix.x_label, color=INK, fontsize=10)
        axes.set_ylabel(matrix.y_label, color=INK, fontsize=10)
        axes.tick_params(colors=INK, labelsize=9, length=2)
        if matrix.rows:
            axes.set_yticks(range(len(matrix.rows)), matrix.rows)
        if matrix.columns:
            axes.set_xticks(range(len(matrix.columns)), matrix.columns)
        for y, row in enumerate(matrix.values if matrix.cell else ()):
            for x, value in enumerate(row):
                bright = value > low + 0.6 * (high - low)
                text = matrix.cell.format(value)
                axes.text(x, y, text, ha="center", va="center", color=INK if bright else "white")
    figure.colorbar(image, ax=list(subplots), label=bar_label, pad=0.02)
    return _print(canvas, path)


def style_axes(axes: Any) -> None:
    """Ink for what is read, a pale grid for values, and no frame."""
    axes.tick_params(colors=INK, labelsize=10, length=3)
    axes.grid(visible=True, axis="y", color=PALE, linewidth=0.7, linestyle="-")
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(EDGE)


def _figure(width: float, height: float, title: str, note: str) -> tuple[Any, Any]:
    figure_module = import_extra("matplotlib.figure")
    agg = import_extra("matplotlib.backends.backend_agg")
    figure = figure_module.Figure(
        figsize=(width, height), dpi=_DPI, facecolor="white", layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    figure.suptitle(title + (f"\n{note}" if note else ""), color=INK, fontsize=11)
    return figure, agg.FigureCanvasAgg(figure)


def _print(canvas: Any, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(str(path))
    return path


def _draw_panel(axes: Any, panel: Panel, handles: dict[str, Any]) -> None:
    """Draw a panel, and add what the legend does not have yet."""
    if panel.log_x:
        axes.set_xscale("log", base=2)
    if panel.log_y:
        axes.set_yscale("log")
    for index, line in enumerate(panel.lines):
        colour = line.colour or CYCLE[index % len(CYCLE)]
        drawn = axes.errorbar(
            line.x,
            line.y,
            yerr=line.spread,
            color=colour,
            linestyle={"line": "-", "dashed": "--", "points": ""}[line.style],
            linewidth=1.8,
            marker="" if line.style == "dashed" or len(line.x) > 60 else "o",
            markersize=4,
            capsize=3,
            elinewidth=1.2,
        )
        if line.label:
            handles.setdefault(line.label, drawn)
    for index, (name, level) in enumerate(panel.levels.items()):
        colour = CYCLE[-1 - index % len(CYCLE)]
        drawn = axes.axhline(level, color=colour, linestyle=(0, (5, 3)), linewidth=1.3)
        handles.setdefault(name, drawn)
    if panel.ticks:
        axes.set_xticks(list(panel.ticks), list(panel.ticks.values()))
        axes.minorticks_off()
    elif all(float(x).is_integer() for line in panel.lines for x in line.x) and not panel.log_x:
        axes.xaxis.set_major_locator(import_extra("matplotlib.ticker").MaxNLocator(integer=True))
    axes.set_title(panel.title, color=INK, fontsize=10)
    axes.set_xlabel(panel.x_label, color=INK, fontsize=10)
    axes.set_ylabel(panel.y_label, color=INK, fontsize=10)
    style_axes(axes)
