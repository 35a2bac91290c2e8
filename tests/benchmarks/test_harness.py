"""Turns, ratios, agreement and results of the benchmarks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness import (
    Disagreement,
    Report,
    Row,
    Spread,
    agree,
    changes,
    ratios,
    table,
    take_turns,
)


def test_a_spread_is_the_median_of_single_turns() -> None:
    """And not the ratio of medians, which would be 2 / 2."""
    spread = ratios([3.0, 2.0, 8.0, 1.0, 2.0], [1.0, 2.0, 2.0, 4.0, 4.0])
    assert spread == Spread(1.0, 0.5, 3.0)
    assert str(spread) == "1.00 (0.50-3.00)"


def test_turns_rotate_and_the_first_ones_are_not_counted() -> None:
    done: list[str] = []

    def program(name: str) -> dict[str, float]:
        done.append(name)
        return {"s": float(len(done))}

    programs = {name: lambda name=name: program(name) for name in "abc"}
    samples = take_turns(programs, 2, warm_up=1)
    assert "".join(done) == "cab" + "abc" + "bca"
    assert samples == {"a": {"s": [4.0, 9.0]}, "b": {"s": [5.0, 7.0]}, "c": {"s": [6.0, 8.0]}}
    done.clear()
    assert take_turns(programs, 0, warm_up=0) == {"a": {}, "b": {}, "c": {}}
    take_turns(programs, 2, warm_up=0, rotate=False)
    assert "".join(done) == "abcabc"


def test_programs_that_agree() -> None:
    """The difference is relative, in the Euclidean norm."""
    results = {
        "ours": {"x": np.array([3.0, 4.0]), "y": np.array([[1.0]])},
        "theirs": {"x": np.array([3.0, 4.005]), "y": np.array([[1.0]])},
    }
    found = agree(results, "ours", 2e-3)
    assert found["ours"] == 0
    assert found["theirs"] == pytest.approx(1e-3)


def test_programs_that_do_not_agree_are_named_all_at_once() -> None:
    results = {
        "ours": {"x": np.array([3.0, 4.0]), "y": np.ones(2), "z": np.zeros(2)},
        "theirs": {"x": np.array([3.0, 4.005]), "y": np.ones(3), "z": np.zeros(2)},
        "nobody's": {"x": np.array([np.nan, 4.0])},
    }
    with pytest.raises(Disagreement) as error:
        agree(results, "ours", 1e-3 / 2)
    lines = str(error.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [
        "ours: z: expected something to compare, got 0.0",
        "theirs: y: expected shape (2,), got (3,)",
        "theirs: z: expected something to compare, got 0.0",
        "theirs: x: 1.0e-03",
        "nobody's: y: expected shape (2,), got None",
        "nobody's: z: expected shape (2,), got None",
        "nobody's: x: nan",
    ]


def test_trainings_are_compared_by_what_they_change() -> None:
    found = changes([2.0, 1.0], {"a": np.ones(2)}, {"a": np.array([1.0, 3.0])})
    assert {name: x.tolist() for name, x in found.items()} == {
        "losses": [2.0, 1.0],
        "change of a": [0.0, 2.0],
    }


def test_a_report_comes_back_from_its_file(tmp_path: Path) -> None:
    row = Row("small", "ours", {"step_s": [1.0, 3.0, 2.0]}, {"bytes": 8.0}, 0.5)
    other = Row("small", "theirs", {"step_s": [2.0, 3.0, 3.0]})
    absent = Row("small", "absent", skipped="needs it")
    machine = {"cpu": "a CPU", "usable_cores": 2, "platform": "cpu", "load_before": 0.5}
    report = Report([row, other, absent], {"tolerance": 1e-3}, "step", {"repeats": 3}, machine)
    report.versions["jax"] = "1.2.3"
    report.save(tmp_path / "new" / "step-cpu.json")
    found = Report.load(tmp_path / "new" / "step-cpu.json")
    assert found == report
    assert found.cases() == ["small"]
    assert found.ran("small") == [row, other]
    assert found.row("small", "ours").median("step_s") == 2.0
    assert found.ratio("small", "theirs", "ours", "step_s").median == 1.5
    assert found.about() == (
        "`python -m benchmarks step`, a CPU, 2 cores, with a load of 0.5 before it; JAX 1.2.3"
    )
    assert dataclasses.replace(found, note="so").about() == f"{found.about()}; so"


def test_a_table() -> None:
    assert table(["program", "time"], [["ours", "1 s"]]).splitlines() == [
        "| program | time |",
        "|---|---:|",
        "| ours | 1 s |",
    ]
