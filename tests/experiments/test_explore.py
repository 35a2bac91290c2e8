"""The exploration: one quick run, what its parts say of each other, and the committed report."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jax_lora as jl

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from jax_lora.experiments.explore.pages import write_pages
from jax_lora.experiments.explore.run import run_explore
from jax_lora.experiments.explore.spectra import overlap
from jax_lora.experiments.explore.study import Explore
from jax_lora.experiments.explore.verdicts import verdicts

DOCS = Path(jl.__file__).parents[1] / "docs" / "exploration"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("explore") / "report"
    return run_explore(Explore(quick=True, out=out)), out


def plots_in(report: str) -> set[str]:
    return set(re.findall(r"!\[[^\]]*\]\(([^)]*)\)", report))


def test_the_report_shows_every_plot_and_verdict(found: Any) -> None:
    results, out = found
    report = (out / "README.md").read_text()
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert plots_in(report) == {path.name for path in out.glob("*.png")} != set()
    claims = verdicts(results)
    assert len(claims) == report.count("| yes |") + report.count("| **no** |")
    assert all(v.claim in report and v.found in report for v in claims)


def test_the_parts_agree(found: Any) -> None:
    results, _ = found
    accuracy, spectra = results["accuracy"], results["spectra"]
    seed = results["config"]["seed"]

    def last(runs: Any) -> list[float]:
        return [run["accuracy"][-1] for run in runs]

    # Measured by a sweep, and by itself on the merged parameters: an image on the edge may turn.
    edge = 1.5 / 360
    full = last(accuracy["full"]["runs"])[seed]
    assert spectra["truncated"][-1]["accuracy"] == pytest.approx(full, abs=edge)
    for run in (*accuracy["full"]["runs"], *accuracy["rank"][0]["runs"]):
        assert run["accuracy"][0] == pytest.approx(results["base_accuracy"], abs=edge)
    switched = results["switching"]
    for task, runs in switched["runs"].items():
        assert switched["accuracy"][task][task] == pytest.approx(last(runs), abs=edge)
    # The article's rank on the images as they are was trained twice.
    own = next(r for r in accuracy["rank"] if r["rank"] == results["config"]["rank"])
    assert last(switched["runs"]["as they are"]) == pytest.approx(last(own["runs"]), abs=edge)

    for path, of in spectra["spectra"].items():
        assert len(of["full"]) == len(of["gaussian"]) == of["min_dim"], path
        for rank, values in of["lora"].items():
            assert len(values) == int(rank)
            assert values == sorted(values, reverse=True)
            assert values[-1] > 0
    counted = results["cost"]["base"]
    for row in accuracy["rank"]:
        # a: [64, r], [8, r], [8, r] and b: [r, 8], [r, 8], [r, 10].
        assert row["params"] == row["rank"] * (64 + 8 + 8 + 8 + 8 + 10)
    assert counted["params"] == accuracy["full"]["params"] == 65 * 8 + 9 * 8 + 9 * 10


def test_a_verdict_follows_its_numbers(found: Any) -> None:
    results = copy.deepcopy(found[0])

    def held(claim: str) -> bool:
        (one,) = (v.held for v in verdicts(results) if v.claim.startswith(claim))
        return one

    improving, closer = "Fine-tuning with LoRA", "A higher rank more closely approximates full"
    closer += " fine-tuning: in its training loss"
    assert held(improving)
    for row, loss in zip(results["accuracy"]["rank"], (0.9, 0.1), strict=True):
        for run, full in zip(row["runs"], results["accuracy"]["full"]["runs"], strict=True):
            run["loss"][-1] = full["loss"][-1] + loss
    assert held(closer)
    for run in results["accuracy"]["rank"][-1]["runs"]:
        run["loss"][-1] += 0.6
        run["accuracy"][-1] = 0.0
    assert not held(closer)
    assert not held(improving)


def test_overlap_of_random_directions_is_their_share() -> None:
    """``E |U^T V|^2 / n = n / d`` for n independent directions among d."""
    rng = np.random.default_rng(0)
    d, n = 40, 8
    bases = [np.linalg.qr(rng.normal(size=(d, n)))[0] for _ in range(400)]
    values = [overlap(u, v)[-1, -1] for u, v in zip(bases[::2], bases[1::2], strict=True)]
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values) - n / d) < 4 * error
    assert overlap(bases[0], bases[0])[-1, -1] == pytest.approx(1, abs=1e-12)


def test_the_committed_report_is_made_from_its_numbers(tmp_path: Path) -> None:
    results = json.loads((DOCS / "results.json").read_text())
    assert results["dataset"] == "CIFAR-10"
    report = write_pages(results, tmp_path).read_text()
    assert report == (DOCS / "README.md").read_text()
    assert plots_in(report) == {path.name for path in DOCS.glob("*.png")}
