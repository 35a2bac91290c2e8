"""A training that is killed five times; the script does it fifty times."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import jax_lora as jl
from jax_lora.experiments import crash_drill
from jax_lora.experiments.crash_drill import CrashDrill, Life, Moment, run_drill, summary

pytest.importorskip("sklearn")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("drill") / "drill.json"
    return out, run_drill(CrashDrill(kills=5, epochs=8, dataset="digits", out=out))


def test_five_kills(drill: tuple[Path, dict[str, Any]]) -> None:
    """That the bits are the same is asserted by the drill itself."""
    out, found = drill
    assert found["kills"] == 5
    assert found["steps"] == 8 * 44
    assert found["most_repeated"] <= found["repeated"]
    assert json.loads(out.read_text()) == json.loads(json.dumps(found))


def test_the_moments_derive_from_the_seed() -> None:
    drawn = [[Moment.draw(random.Random(seed)) for _ in range(3)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_summary() -> None:
    moment = Moment(early=False, seconds=0.1)
    lives = [
        Life(moment, True, 0, 20, 15, True),
        Life(moment, True, None, None, 15, False),
        Life(moment, True, 15, 30, 20, False),
        Life(None, False, 20, 40, 40, False),
    ]
    assert summary(lives) == {
        "kills": 3,
        "while_saving": 1,
        "before_first_step": 1,
        "repeated": 15,
        "most_repeated": 10,
    }


def test_other_bits_are_seen(tmp_path: Path) -> None:
    """The control: it compares arrays, and what was measured."""

    def end(name: str, value: float, loss: float) -> Path:
        history = {"loss": [loss], "seconds": value, "resumed_at": []}
        with jl.io.Checkpoints(tmp_path / name) as saved:
            saved.save(7, {"w": jnp.full(3, value)}, (), metadata={"history": history})
        return tmp_path / name

    expected = end("expected", 1.0, 0.5)
    crash_drill._compare(end("same", 1.0, 0.5), expected)
    with pytest.raises(jl.JaxLoraError, match="expected the bits of"):
        crash_drill._compare(end("bits", 1.0000001, 0.5), expected)
    with pytest.raises(jl.JaxLoraError, match="expected the losses and accuracies"):
        crash_drill._compare(end("loss", 1.0, 0.25), expected)
