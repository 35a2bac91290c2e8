"""The engine's benchmark: its programs agree, it notices when they do not, and what it prints."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "engine.py"


@pytest.fixture(scope="module")
def engine() -> ModuleType:
    """The program as a module; benchmarks/ is no package, so it is loaded from its file."""
    spec = importlib.util.spec_from_file_location("engine", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its own module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_apply_agrees_with_lora_by_hand_in_every_model(
    engine: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--quick`` ends the program where a loss or a gradient differs."""
    assert engine.main(["--quick"]) == []
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:-1]] == list(engine.MODELS)
    assert lines[-1].endswith("nothing was timed")


def test_a_difference_ends_it(engine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model = engine.make_mlp(True)
    adapter = engine.make_adapter(model)
    assert engine.check(model, adapter) < engine.TOLERANCE
    weak = jax.tree.map(lambda leaf: leaf * 0.01 if leaf.ndim else leaf, adapter)
    with pytest.raises(SystemExit, match="expected the adapter to change the loss"):
        engine.check(model, weak)
    # The program by hand alone reads it.
    monkeypatch.setattr(engine, "SCALE", engine.SCALE * 1.01)
    with pytest.raises(SystemExit, match="the gradient of layers/1/kernel b: "):
        engine.check(model, adapter)


def test_building_tells_programs_apart(engine: ModuleType) -> None:
    model = engine.make_mlp(True)
    adapter = engine.make_adapter(model)
    _, by_hand, counts = engine.build(engine.HAND, model, adapter)
    times, compiled, ours = engine.build(engine.OURS, model, adapter)
    assert times.total_s == times.trace_s + times.lower_s + times.compile_s
    # Each of three layers: x W, x a and h b; for the gradients of a, b and h one each, and for that
    # of x, but in the first layer, one through W and one through a.
    assert counts["dot_generals"] == ours["dot_generals"] == 3 * (3 + 3) + 2 * 2
    assert counts["flops"] > 0
    loss, _ = by_hand(engine.program(engine.HAND, model, adapter)[1], model.params, *model.batch)
    assert jnp.allclose(compiled(adapter, model.params, *model.batch)[0], loss, rtol=1e-5)


def test_what_it_prints(engine: ModuleType) -> None:
    spread = engine.ratios([3.0, 2.0, 4.0], [1.0, 1.0, 1.0])
    assert (spread.low, spread.median, spread.high) == (2.5, 3.0, 3.5)
    assert str(spread) == "3.00 (2.50-3.50)"
    counts = {"stablehlo_lines": 9.0, "dot_generals": 2.0, "flops": 8.0, "temp_bytes": 4.0}
    built = [engine.Built(0.1, 0.2, 0.3, 1.0), engine.Built(0.3, 0.4, 0.5, 2.0)]
    kinds = (engine.PLAIN, engine.HAND, engine.OURS)
    names = ("build, apply / plain", "run, apply / by hand")
    result = engine.Result(
        name="mlp",
        what="an MLP",
        difference=0.0,
        counts=dict.fromkeys(kinds, counts),
        built=dict.fromkeys(kinds, built),
        run_s={kind: [0.5, 0.7] for kind in kinds[1:]},
        ratios={names[0]: engine.Spread(1.2, 1, 1.3), names[1]: engine.Spread(1.06, 1, 2)},
    )
    table = engine.table([result])
    assert "| mlp | 1.20 (1.00-1.30) | 1.06 (1.00-2.00) | 1.000 | 1.000 |" in table
    assert "| mlp | apply | 200 | 300 | 400 | 900 | 9 | 2 | 600.0 |" in table
    reached, missed = engine.expectations([result]).splitlines()
    assert reached.endswith("expected at most 1.25, got 1.20: reached")
    assert missed.endswith("expected at most 1.05, got 1.06: missed")
