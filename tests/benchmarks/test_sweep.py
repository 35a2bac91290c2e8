"""The benchmark of sweeps: it compares, refuses what differs, and measures."""

from __future__ import annotations

import jax
import pytest

pytest.importorskip("flax")

from benchmarks import sweep


def test_a_sweep_is_every_run_alone(capsys: pytest.CaptureFixture[str]) -> None:
    result = sweep.main(["--quick"])
    assert "agree" in capsys.readouterr().out
    assert set(result.difference) == {"same", "own"}
    assert set(result.seconds) == {"alone", "vmap", "same", "own"}


def test_what_was_trained_otherwise_is_refused() -> None:
    def alone(adapter: float, key: float) -> jax.Array:
        return jax.numpy.array([adapter + 1.0])

    start, key = [jax.numpy.array([2.0])], [0.0]
    assert sweep.check(start, alone, [jax.numpy.array([3.0])], key) == 0
    with pytest.raises(SystemExit, match="within"):
        sweep.check(start, alone, [jax.numpy.array([3.1])], key)
    with pytest.raises(SystemExit, match="learning made a difference of 0"):
        sweep.check(start, lambda adapter, key: adapter, start, key)
