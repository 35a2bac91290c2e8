"""The benchmark of training checkpoints runs, and restores what it saved."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "checkpoints.py"


@pytest.fixture(scope="module")
def checkpoints() -> ModuleType:
    """The program as a module; benchmarks/ is no package, so it is loaded from its file."""
    spec = importlib.util.spec_from_file_location("checkpoints_benchmark", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its own module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _promotion() -> Iterator[None]:
    # optax.adam itself mixes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_quick(checkpoints: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "times.json"
    results = checkpoints.main(["--quick", "--turns", "1", "--save", str(out)])
    assert [result["model"] for result in results] == ["scanned", "unrolled"]
    # Two weights, each a, b and scale, two moments of a and b, and Adam's count; three layers.
    assert [result["arrays"] for result in results] == [2 * 7 + 1, 3 * 2 * 7 + 1]
    assert json.loads(out.read_text())["results"] == json.loads(json.dumps(results))
    printed = capsys.readouterr().out
    assert printed.count("blocked, ") == 2
    assert "orbax CheckpointManager" in printed


def test_both_writers_give_back_what_is_trained(checkpoints: ModuleType, tmp_path: Path) -> None:
    training = checkpoints.Training("scanned", checkpoints.QUICK)
    for k, (name, make) in enumerate(checkpoints.WRITERS.items()):
        writer = make(training, tmp_path / str(k))
        expected = jax.tree.map(np.array, training.leaves)
        writer.save(1)
        training.step()  # reuses the memory of what is saved
        writer.wait()
        found = jax.tree.leaves(writer.restore())
        writer.close()
        assert bits(found) == bits(expected), name
        assert bits(found) != bits(training.leaves), name


def bits(arrays: Any) -> list[bytes]:
    """In no order, as the writers have their own."""
    return sorted(np.asarray(array).tobytes() for array in arrays)
