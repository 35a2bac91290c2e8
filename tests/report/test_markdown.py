"""The report says what the results say, and changes with each of them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jax_lora import report
from jax_lora.experiments.article_values import ARTICLE

Results = dict[str, Any]
MakeResults = Callable[..., Results]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every number, string and flag."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*path, key))
    else:
        yield path


def perturbed(results: Results, path: tuple[Any, ...]) -> Results:
    """The results with one leaf changed."""
    changed = copy.deepcopy(results)
    inner: Any = changed
    for key in path[:-1]:
        inner = inner[key]
    value = inner[path[-1]]
    if isinstance(value, bool):
        inner[path[-1]] = not value
    elif isinstance(value, str):
        inner[path[-1]] = value + "x"
    else:
        inner[path[-1]] = value + (1 if isinstance(value, int) else 0.0101)
    return changed


def report_text(folder: Path, results: Results, reference: Any = None) -> str:
    return report.write_report(results, folder / "report.md", reference).read_text("utf-8")


def section(text: str, title: str) -> str:
    """One section of a report, without its heading."""
    return text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def table_rows(text: str) -> list[list[str]]:
    """The cells of the body of a section's only table."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(row) for row in rows} == {len(rows[0])}
    return rows[2:]


def test_headline(tmp_path: Path, make_results: MakeResults) -> None:
    text = report_text(tmp_path, make_results(), ARTICLE)
    headline = text.splitlines()[2]
    for words in (
        *("115,008", "526,154", "21.9 %", "rank 32", "up from 50.31 % to 51.28 %"),
        *("+0.97 points", "49 % before and 51 % after"),
    ):
        assert words in headline


def test_headline_is_honest(tmp_path: Path, make_results: MakeResults) -> None:
    results = make_results(optional=False)
    results["base"]["accuracy"][-1] = 0.6
    results["lora"]["accuracy"][-1] = 0.59
    assert "down from 60.00 % to 59.00 % (-1.00 points)" in report_text(tmp_path, results)
    results["lora"]["accuracy"][-1] = 0.6
    assert "unchanged at 60.00 %" in report_text(tmp_path, results)
    results["lora"]["accuracy"][-1] = None
    headline = report_text(tmp_path, results).splitlines()[2]
    assert "test accuracy - (before: 60.00 %)" in headline


def test_every_leaf_of_the_results_shows(tmp_path: Path, make_results: MakeResults) -> None:
    """Whatever number, name or flag of the results changes, the report changes."""
    results = make_results()
    text = report_text(tmp_path, results)
    unseen = [
        ".".join(map(str, path))
        for path in leaves(results)
        if report_text(tmp_path, perturbed(results, path)) == text
    ]
    assert unseen == []


def test_numbers_as_they_are_written(tmp_path: Path, make_results: MakeResults) -> None:
    results = make_results()
    text = report_text(tmp_path, results)
    base, lora = results["base"], results["lora"]
    shares = [*base["accuracy"], *lora["accuracy"], lora["accuracy_before"]]
    expected = [f"{100 * value:.2f} %" for value in shares]
    expected += [f"{value:.3f}" for value in base["loss"] + lora["loss"]]
    expected += ["411,146", "115,008", "526,154", "1,644,584", "460,032", "1,650,113"]
    expected += ["470,227", "1,644,588", "460,036", "28.0 %"]
    # Gradients and optimizer state together: 1,644,584 + 1,644,588 and 460,032 + 460,036.
    expected += ["3,289,172", "920,068"]
    expected += ["1.26", "0.91", "7.62", "1.13", "8.47", "19.95", "1.52", "1.69"]
    expected += ["seed 17", "1,563 steps", "rank 32", "alpha 1", "mean of 500 steps"]
    expected += results["notes"] + list(results["tables"].values())
    assert [item for item in expected if item not in text] == []


def test_accuracy_beside_the_articles(tmp_path: Path, make_results: MakeResults) -> None:
    results = make_results()
    rows = table_rows(section(report_text(tmp_path, results, ARTICLE), "Test accuracy"))
    assert rows[0] == ["before", "", "", "50.31 %", ""]
    assert rows[1] == ["1", "39.32 %", "38 %", "50.44 %", "50 %"]
    assert rows[5] == ["5", "49.49 %", "49 %", "51.28 %", "51 %"]
    assert len(rows) == 6


def test_loss_beside_the_articles(tmp_path: Path, make_results: MakeResults) -> None:
    rows = table_rows(section(report_text(tmp_path, make_results(), ARTICLE), "Training loss"))
    assert rows[0] == ["1", "500", "2.144", "2.150", "1.348", "1.341"]
    assert [row[:2] for row in rows[2:4]] == [["1", "1,500"], ["2", "500"]]
    assert [float(row[3]) for row in rows] == list(ARTICLE["base"]["loss"])
    assert [float(row[5]) for row in rows] == list(ARTICLE["lora"]["loss"])


def test_the_largest_difference_is_named(tmp_path: Path, make_results: MakeResults) -> None:
    results = make_results()
    for phase in report.PHASES:
        results[phase]["accuracy"] = list(ARTICLE[phase]["accuracy"])
        results[phase]["loss"] = list(ARTICLE[phase]["loss"])
    text = report_text(tmp_path, results, ARTICLE)
    assert "Largest difference from the article: 0.00 points" in text
    results["lora"]["accuracy"][2] += 0.03
    results["base"]["loss"][4] -= 0.25
    text = report_text(tmp_path, results, ARTICLE)
    assert "3.00 points (LoRA, epoch 3)" in section(text, "Test accuracy")
    assert "0.250 (base, epoch 2, step 1,000)" in section(text, "Training loss")


def test_other_windows_are_not_compared(tmp_path: Path, make_results: MakeResults) -> None:
    results = make_results(loss_window=250)
    text = section(report_text(tmp_path, results, ARTICLE), "Training loss")
    assert len(table_rows(text)[0]) == 4
    assert "means of 500 steps in epochs of 1,563" in text


def test_no_reference_no_comparison(tmp_path: Path, make_results: MakeResults) -> None:
    results = make_results(steps_per_epoch=45, loss_window=10) | {"dataset": "digits"}
    text = report_text(tmp_path, results)
    assert "no reference values were given for digits" in text
    assert "article" not in text
    assert "article" in report_text(tmp_path, results, ARTICLE)
    assert len(table_rows(section(text, "Training loss"))) == 5 * 4


def test_an_earlier_run_is_a_reference(tmp_path: Path, make_results: MakeResults) -> None:
    earlier = make_results() | {"name": "earlier run"}
    rows = table_rows(section(report_text(tmp_path, make_results(), earlier), "Test accuracy"))
    assert all(row[1] == row[2] and row[3] == row[4] for row in rows[1:])


def test_optional_keys_may_be_absent(tmp_path: Path, make_results: MakeResults) -> None:
    text = report_text(tmp_path, make_results(optional=False), ARTICLE)
    assert "| on disk | - | - | - |" in text
    assert "optimizer state |" not in text
    assert "preset" not in text
    same = make_results(optional=False) | {"config_changes": {}}
    assert "Every option is the preset's." in report_text(tmp_path, same)


def test_changed_base_is_said_loudly(tmp_path: Path, make_results: MakeResults) -> None:
    results = make_results()
    assert "bitwise what they were" in report_text(tmp_path, results)
    results["base_unchanged"] = False
    text = report_text(tmp_path, results)
    assert "bitwise what they were" not in text
    assert "**The base weights changed" in text


@pytest.mark.parametrize("epochs", [(1, 1), (1, 4), (7, 2), (0, 3), (0, 0)])
def test_any_number_of_epochs(
    tmp_path: Path, epochs: tuple[int, int], make_results: MakeResults
) -> None:
    text = report_text(tmp_path, make_results(*epochs, optional=False), ARTICLE)
    if any(epochs):
        assert len(table_rows(section(text, "Test accuracy"))) == max(epochs)
        assert len(table_rows(section(text, "Training loss"))) == 3 * max(epochs)


def test_no_loss_windows(tmp_path: Path, make_results: MakeResults) -> None:
    text = report_text(tmp_path, make_results(steps_per_epoch=45))
    assert "no full window of 500 steps in an epoch of 45" in text
    assert "loss.png" not in text


def test_links_are_the_pictures_drawn(tmp_path: Path, make_results: MakeResults) -> None:
    pytest.importorskip("matplotlib")
    results = make_results()
    links = re.findall(r"!\[.*?\]\((.*?)\)", report_text(tmp_path, results))
    drawn = report.write_plots(results, tmp_path)
    assert links == [path.name for path in drawn]


def test_cells_do_not_break_the_table(tmp_path: Path, make_results: MakeResults) -> None:
    results = make_results() | {"config": {"rules": "l1|l2"}}
    assert "| `rules` | `l1\\|l2` |" in report_text(tmp_path, results)


def test_missing_keys_are_named_together(tmp_path: Path, make_results: MakeResults) -> None:
    results = make_results()
    del results["versions"], results["lora"]["rank"]
    with pytest.raises(ValueError, match=r"without lora\.rank, versions"):
        report.write_report(results, tmp_path / "report.md")
