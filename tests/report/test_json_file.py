"""Results as JSON: read back, in the reader's order, all or nothing."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jax_lora import report
from jax_lora.experiments.article_values import ARTICLE

Results = dict[str, Any]
MakeResults = Callable[..., Results]


def test_round_trip(tmp_path: Path, make_results: MakeResults) -> None:
    results = make_results()
    path = report.write_json(results, tmp_path / "new" / "results.json")
    text = path.read_text("utf-8")
    assert json.loads(text) == results
    assert text.endswith("}\n")


def test_order_is_the_readers_and_not_the_callers(
    tmp_path: Path, make_results: MakeResults
) -> None:
    results = make_results() | {"zeta": 1, "eta": 2}
    backwards = dict(reversed(results.items()))
    keys = list(json.loads(report.write_json(backwards, tmp_path / "r.json").read_text()))
    assert keys[:2] == ["dataset", "dataset_source"]
    assert keys[-3:] == ["eta", "zeta", "tables"]


def test_what_is_not_finite_becomes_null(tmp_path: Path, make_results: MakeResults) -> None:
    results = make_results()
    results["base"]["loss"][3] = math.nan
    results["lora"]["loss"][0] = math.inf
    text = report.write_json(results, tmp_path / "results.json").read_text()
    read = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert read["base"]["loss"][3] is None
    assert read["lora"]["loss"][0] is None
    report.write_report(read, tmp_path / "report.md", ARTICLE)


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = report.write_json({"seed": 1}, tmp_path / "results.json")
    with pytest.raises(TypeError):
        report.write_json({"seed": object()}, path)
    assert json.loads(path.read_text()) == {"seed": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_interruption_before_the_swap_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = report.write_json({"seed": 1}, tmp_path / "results.json")

    def interrupted(source: Path, target: Path) -> None:
        assert json.loads(source.read_text()) == {"seed": 2}
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.write_json({"seed": 2}, path)
    assert json.loads(path.read_text()) == {"seed": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.skipif(os.name == "nt", reason="permission bits")
def test_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    path = report.write_json({}, tmp_path / "results.json")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
