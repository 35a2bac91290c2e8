"""The pictures, looked at pixel by pixel."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_lora import report
from jax_lora.experiments.article_values import ARTICLE

Results = dict[str, Any]
MakeResults = Callable[..., Results]


def pixels(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    image = pytest.importorskip("matplotlib.image").imread(path)
    rgb: np.ndarray[Any, np.dtype[np.uint8]] = np.round(255 * image[..., :3]).astype(np.uint8)
    return rgb


def count(image: np.ndarray[Any, Any], colour: str) -> int:
    """How many pixels are exactly of a colour written #rrggbb."""
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((image == rgb).all(axis=-1).sum())


@pytest.fixture(autouse=True)
def _needs_matplotlib() -> None:
    pytest.importorskip("matplotlib")


@pytest.mark.parametrize("reference", [None, ARTICLE])
def test_pictures_are_png_of_the_size_and_colours(
    tmp_path: Path, reference: Any, make_results: MakeResults
) -> None:
    paths = report.write_plots(make_results(), tmp_path / "new", reference)
    assert [path.name for path in paths] == ["accuracy.png", "loss.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        image = pixels(path)
        assert image.shape == (750, 1200, 3)
        assert min(count(image, colour) for colour in report.COLOURS.values()) > 1000
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (border == 255).all(), "something is cut off at the edge"


def test_a_phase_without_values_has_no_colour(tmp_path: Path, make_results: MakeResults) -> None:
    results = make_results()
    results["lora"]["accuracy"] = [None] * 5
    image = pixels(report.write_plots(results, tmp_path)[0])
    assert count(image, report.COLOURS["lora"]) == 0
    assert count(image, report.COLOURS["base"]) > 1000


def test_colours_are_blue_and_pink() -> None:
    red, green, blue = (int(report.COLOURS["base"][i : i + 2], 16) for i in (1, 3, 5))
    assert blue > 1.5 * green > red
    red, green, blue = (int(report.COLOURS["lora"][i : i + 2], 16) for i in (1, 3, 5))
    assert red > blue > 1.5 * green


def test_reference_changes_the_picture(tmp_path: Path, make_results: MakeResults) -> None:
    results = make_results()
    alone = report.write_plots(results, tmp_path / "alone")
    again = report.write_plots(results, tmp_path / "again")
    beside = report.write_plots(results, tmp_path / "beside", ARTICLE)
    for first, second, third in zip(alone, again, beside, strict=True):
        assert (pixels(first) == pixels(second)).all()
        assert (pixels(first) != pixels(third)).any(axis=-1).sum() > 1000


@pytest.mark.parametrize("phase", ["base", "lora"])
def test_each_of_the_references_points_is_drawn(
    tmp_path: Path, phase: str, make_results: MakeResults
) -> None:
    """Moving one inner point, which moves no axis, moves something in the picture."""
    other = copy.deepcopy(dict(ARTICLE))
    for key in ("accuracy", "loss"):
        points = list(other[phase][key])
        points[2] = (points[1] + points[0]) / 2 - 0.01
        other[phase][key] = points
    first = report.write_plots(make_results(), tmp_path / "first", ARTICLE)
    second = report.write_plots(make_results(), tmp_path / "second", other)
    for one, two in zip(first, second, strict=True):
        assert (pixels(one) != pixels(two)).any(axis=-1).sum() > 100


@pytest.mark.parametrize("epochs", [(1, 1), (1, 4), (7, 2), (60, 40), (0, 3), (0, 0)])
@pytest.mark.parametrize("reference", [None, ARTICLE])
def test_any_number_of_epochs(
    tmp_path: Path, epochs: tuple[int, int], reference: Any, make_results: MakeResults
) -> None:
    paths = report.write_plots(make_results(*epochs), tmp_path, reference)
    assert len(paths) == (2 if any(epochs) else 1)
    for path in paths:
        for phase, length in zip(report.PHASES, epochs, strict=True):
            seen = count(pixels(path), report.COLOURS[phase])
            assert (seen > 30) == (length > 0)


def test_no_losses_no_picture_of_them(tmp_path: Path, make_results: MakeResults) -> None:
    paths = report.write_plots(make_results(steps_per_epoch=45), tmp_path)
    assert [path.name for path in paths] == ["accuracy.png"]
