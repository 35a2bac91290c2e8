"""The benchmark of the bank: what it measures is right, counted, printed and saved."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "bank.py"


@pytest.fixture(scope="module")
def program() -> SimpleNamespace:
    """What the program defines; benchmarks/ is no package."""
    return SimpleNamespace(**runpy.run_path(str(PROGRAM)))


def test_batches_and_writing(
    program: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--slots", "5", "--width", "8", "--batch", "4", "--tokens", "2", "--repeats", "1"]
    results = program.main([*sizes, "--save", str(tmp_path / "x.json")])
    saved = json.loads((tmp_path / "x.json").read_text())
    assert saved["results"] == results
    (batch,) = results["batches"]
    assert (batch["tokens"], batch["adapters"]) == (2, 4)
    assert batch["largest_error"] < 1e-5
    assert results["writing"]["compiled"] == 0
    assert {*program.WRITES} < {*results["writing"]}
    assert "expected at most 1.3 times one adapter" in capsys.readouterr().out


def test_all_forms_agree(program: SimpleNamespace) -> None:
    """It measures nothing otherwise."""
    (one,) = program.measure_forms(1, [(6, 1, 3, 16)])
    assert all(one[f"{name}_ms"]["median"] > 0 for name in program.FORMS)
    (large,) = program.measure_forms(1, [(2, 3, 3, 16)])
    assert large["fused_ms"] is None  # several rows for each factor
