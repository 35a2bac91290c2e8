"""The trials of a sweep as pictures: their curves, and what each hyperparameter did.

The results are a JSON-able dict::

    metric: str             what decides which trial is better
    mode: "max" | "min"     whether that is a larger or a smaller value
    best: int               the index of the best trial
    trials: [{trial: {name: value}, loss: [one per epoch],
              metrics: {name: [before the first epoch, after each]}}]

where the metric may be ``training_loss``, the last of ``loss``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_lora.report.charts import CYCLE, Line, Panel, draw_panels
from jax_lora.report.results import as_float

TRAINING_LOSS = "training_loss"
#: With more combinations than this, only the best one's curve has a colour and a name.
_MANY = 8
_BEST, _OTHERS = CYCLE[1], "#b8c4d0"


def write_sweep_plots(results: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Draw ``curves.png``, and ``hyperparameters.png`` where any hyperparameter differs.

    In the curves, trials that differ in their seed alone are one line, with error bars of a
    standard deviation.

    Args:
        results: The results of a sweep.
        folder: Where to put the pictures; made if need be.

    Returns:
        The pictures drawn.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    folder, trials = Path(folder), results["trials"]
    varied = [name for name in trials[0]["trial"] if name != "seed" and _differs(trials, name)]
    count = f"{len(trials)} trials"
    paths = [draw_panels(folder / "curves.png", _curves(results, varied), f"{count}, by epoch")]
    if varied:
        panels = [_panel_of(results, name) for name in varied]
        title = f"{count}: {_words(results['metric'])} by hyperparameter"
        note = "points: trials; line: their means"
        paths.append(draw_panels(folder / "hyperparameters.png", panels, title, note))
    return paths


def _differs(trials: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(trial["trial"][name] != trials[0]["trial"][name] for trial in trials)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _curves(results: Mapping[str, Any], varied: Sequence[str]) -> list[Panel]:
    """A panel for the metric, if it is not the loss, and one for the loss."""
    trials, metric = results["trials"], results["metric"]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for trial in trials:
        label = ", ".join(f"{_words(name)} {_word(trial['trial'][name])}" for name in varied)
        groups.setdefault(label, []).append(trial)
    best = next(label for label, group in groups.items() if trials[results["best"]] in group)
    # The best one last, over the others.
    labels = sorted(groups, key=lambda label: label == best)

    def lines(curve: Callable[[Any], Sequence[float | None]], first: int) -> list[Line]:
        return [
            _mean_line([curve(trial) for trial in groups[label]], first, *look)
            for label, look in zip(labels, _looks(labels), strict=True)
        ]

    panels = [Panel("epoch", "training loss", lines(lambda trial: trial["loss"], 1))]
    if metric != TRAINING_LOSS:
        curves = lines(lambda trial: trial["metrics"][metric], 0)
        panels.insert(0, Panel("epoch", _words(metric), curves))
    return panels


def _looks(labels: Sequence[str]) -> list[tuple[str, str]]:
    """The name and the colour of each combination's curve, of which the last one is the best."""
    if len(labels) == 1:
        return [(labels[0], _BEST)]
    others = [colour for colour in CYCLE if colour != _BEST]
    looks = [(label, others[k % len(others)]) for k, label in enumerate(labels[:-1])]
    if len(labels) > _MANY:
        looks = [("the others", _OTHERS)] * (len(labels) - 1)
    return [*looks, (f"{labels[-1]} (best)", _BEST)]


def _mean_line(
    curves: Sequence[Sequence[float | None]], first: int, label: str, colour: str
) -> Line:
    """The mean of curves, as far as all of them go."""
    columns = [[as_float(value) for value in column] for column in zip(*curves, strict=False)]
    spread = [statistics.stdev(column) for column in columns] if len(curves) > 1 else None
    means = [statistics.fmean(column) for column in columns]
    return Line(label, range(first, first + len(columns)), means, spread, colour)


def _panel_of(results: Mapping[str, Any], name: str) -> Panel:
    """The metric of each trial at its value of a hyperparameter."""
    points: dict[Any, list[float]] = {}
    for trial in results["trials"]:
        value = trial["trial"][name]
        points.setdefault(_word(value) if not _is_number(value) else value, []).append(
            _final(results, trial)
        )
    numeric = all(map(_is_number, points))
    ordered = sorted(points) if numeric else list(points)
    log = numeric and min(ordered) > 0 and max(ordered) / min(ordered) > 4
    place = {value: value if numeric else index for index, value in enumerate(ordered)}
    xs = [place[value] for value in ordered for _ in points[value]]
    ys = [y for value in ordered for y in points[value]]
    finite = {v: [y for y in points[v] if math.isfinite(y)] for v in ordered}
    means = [statistics.fmean(f) if (f := finite[v]) else math.nan for v in ordered]
    return Panel(
        _words(name),
        f"{_words(results['metric'])} after the last epoch",
        [
            Line("", xs, ys, colour=CYCLE[0], style="points"),
            Line("", [place[v] for v in ordered], means, colour=CYCLE[1]),
        ],
        log_x=log,
        ticks={place[value]: _word(value) for value in ordered} if len(ordered) <= 10 else {},
    )


def _final(results: Mapping[str, Any], trial: Mapping[str, Any]) -> float:
    metric = results["metric"]
    values = trial["loss"] if metric == TRAINING_LOSS else trial["metrics"][metric]
    return as_float(values[-1])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
