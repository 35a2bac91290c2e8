"""The whole experiment on the digits, at tiny sizes: every file and every number it leaves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.experiments.article import Reproduce, new_folder, run_reproduce
from jax_lora.experiments.epochs import Resident
from jax_lora.experiments.options import DataOptions
from jax_lora.experiments.phases import load_base, load_data, same_bits

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboardX")

HIDDEN, RANK, EPOCHS = 12, 3, 2
SIZES = ((64, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 10))
BASE = sum(n_in * n_out + n_out for n_in, n_out in SIZES)
ADAPTER = sum(RANK * (n_in + n_out) for n_in, n_out in SIZES)
SPEED = {"learning_rate": 0.02, "batch_size": 64, "epochs": EPOCHS}
TINY = {"dataset": "digits", "hidden_dim": HIDDEN, "rank": RANK, "num_devices": 1} | SPEED


@pytest.fixture(scope="module")
def reproduce(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """Run the experiment with some options; returns its folder and what it returned."""

    def run(**options: Any) -> tuple[Path, Any]:
        out = tmp_path_factory.mktemp("reproduce") / "new"
        return out, run_reproduce(Reproduce(**TINY, **options, out=out))

    return run


@pytest.fixture(scope="module")
def first(reproduce: Callable[..., tuple[Path, Any]]) -> tuple[Path, Any]:
    return reproduce(seed=3)


def numbers(results: Any) -> Any:
    return [results[phase][key] for phase in ("base", "lora") for key in ("accuracy", "loss")]


def test_leaves_every_file(first: tuple[Path, Any]) -> None:
    out, _ = first
    assert sorted(path.name for path in out.iterdir()) == [
        *("accuracy.png", "adapter", "base", "loss.png"),
        *("report.md", "results.json", "tensorboard"),
    ]
    for phase in ("base", "lora"):
        events = list((out / "tensorboard" / phase).iterdir())
        assert ["tfevents" in event.name for event in events] == [True]
        assert events[0].stat().st_size > 100


def test_results_hold_what_was_asked_for(first: tuple[Path, Any]) -> None:
    out, returned = first
    results = json.loads((out / "results.json").read_text())
    assert results == json.loads(json.dumps(returned))
    assert (results["dataset"], results["seed"]) == ("digits", 3)
    assert results["base"]["params"] == BASE
    assert results["lora"]["trainable_params"] == ADAPTER
    assert results["lora"]["total_params"] == BASE + ADAPTER
    for phase in ("base", "lora"):
        assert len(results[phase]["accuracy"]) == EPOCHS
        assert all(0 < accuracy < 1 for accuracy in results[phase]["accuracy"])
        # 1,437 examples are 23 steps, in windows of a third of them.
        assert len(results[phase]["loss"]) == EPOCHS * 3
        assert min(results["seconds"][phase][kind] for kind in ("compile", "run")) > 0
    assert (results["steps_per_epoch"], results["loss_window"]) == (23, 7)
    assert results["base_unchanged"] is True
    # Float32, and one scale for each of three layers.
    assert results["base_bytes"] == 4 * BASE
    assert results["adapter_bytes"] == 4 * (ADAPTER + 3)
    assert results["optimizer_bytes"] == {"base": 4 * BASE, "lora": 4 * ADAPTER}
    assert results["lora"]["accuracy_before"] == results["base"]["accuracy"][-1]
    assert results["config"]["rank"] == RANK
    assert results["config_changes"]["rank"] == [32, RANK]
    (note,) = results["notes"]
    assert "not on CIFAR-10" in note


def test_it_learns(first: tuple[Path, Any]) -> None:
    _, results = first
    assert results["base"]["loss"][-1] < results["base"]["loss"][0]
    assert results["lora"]["accuracy"][-1] > results["base"]["accuracy"][0] > 0.1


def test_report_says_what_the_results_say(first: tuple[Path, Any]) -> None:
    out, results = first
    report = (out / "report.md").read_text()
    for accuracy in (*results["base"]["accuracy"], *results["lora"]["accuracy"]):
        assert f"{100 * accuracy:.2f} %" in report
    assert f"{ADAPTER:,}" in report
    assert "no reference values were given for digits" in report


def test_checkpoints_are_those_of_the_results(first: tuple[Path, Any]) -> None:
    """Evaluated here by hand, with ordinary numpy: base, and base + scale A B."""
    out, results = first
    model, params, metadata = load_base(out / "base")
    adapter, config, adapter_metadata = jl.io.load_adapter(out / "adapter", params)
    assert model.features == (HIDDEN, HIDDEN, 10)
    assert (metadata["dataset"], metadata["max_value"]) == ("digits", 16)
    assert metadata["accuracy"] == results["base"]["accuracy"][-1]
    assert adapter_metadata["accuracy"] == results["lora"]["accuracy"][-1]
    assert config is not None
    assert (config.rank, config.alpha, config.scaling, config.init) == (RANK, 1, "alpha", "article")

    test = load_data(DataOptions(dataset="digits")).test
    x = test.images.reshape(len(test), -1) / 8.0 - 1
    for phase, scale in (("base", 0.0), ("lora", 1.0)):
        hidden = x
        for index in (1, 2, 3):
            layer = params["params"][f"l{index}"]
            factors = adapter[f"params/l{index}/kernel"]
            assert factors.scale == 1
            update = np.asarray(factors.a, np.float64) @ np.asarray(factors.b, np.float64)
            hidden = hidden @ (layer["kernel"] + scale * update) + layer["bias"]
            hidden = np.maximum(hidden, 0) if index < 3 else hidden
        accuracy = (hidden.argmax(-1) == test.labels).mean()
        # A tie broken by rounding may turn one image.
        assert accuracy == pytest.approx(results[phase]["accuracy"][-1], abs=1.01 / len(test))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The first experiment once more, interrupted in the middle of its second phase."""
    out = tmp_path_factory.mktemp("resumed") / "new"
    options = Reproduce(**TINY, seed=3, out=out, save_every_steps=4, resume=True)
    run_steps, calls = Resident.__call__, 0

    def interrupted(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 20:  # a phase has two epochs in six parts each
            raise KeyboardInterrupt
        return run_steps(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Resident, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_reproduce(options)
        assert sorted(path.name for path in out.iterdir()) == ["base", "checkpoints"]
        # The base would get ahead of the adapter, and no --epochs would be right any more.
        with pytest.raises(jl.ConfigError, match=f"expected --epochs 2, as {out / 'base'} is save"):
            run_reproduce(dataclasses.replace(options, epochs=3))
        return out, run_reproduce(options)


def test_the_seed_decides_every_number(
    first: tuple[Path, Any],
    resumed: tuple[Path, Any],
    reproduce: Callable[..., tuple[Path, Any]],
) -> None:
    """Interrupted or not."""
    (out, results), (again_out, again) = first, resumed
    assert numbers(again) == numbers(results)
    assert again["lora"]["accuracy_before"] == results["lora"]["accuracy_before"]
    for name in ("base", "adapter"):
        load = jl.io.load_params if name == "base" else jl.io.load_adapter
        assert same_bits(load(again_out / name)[0], load(out / name)[0])
    _, other = reproduce(seed=4)
    assert all(one != two for one, two in zip(numbers(other), numbers(results), strict=True))


def test_an_interrupted_run_says_so(first: tuple[Path, Any], resumed: tuple[Path, Any]) -> None:
    (_, results), (out, again) = first, resumed
    assert again["notes"][:1] == results["notes"]
    assert "interrupted and resumed (base after the steps none; LoRA after" in again["notes"][1]
    assert again["notes"][1][:30] in (out / "report.md").read_text()
    with pytest.raises(jl.ConfigError, match=f"{out} is finished"):
        run_reproduce(Reproduce(**TINY, seed=3, out=out, save_every_steps=4, resume=True))


def test_same_bits() -> None:
    tree = {"a": jnp.array([jnp.nan, -0.0]), "b": [jnp.int32(1)]}
    assert same_bits(tree, jax.tree.map(np.array, tree))
    others = [
        {"a": jnp.array([jnp.nan, 0.0]), "b": [jnp.int32(1)]},
        {"a": jnp.array([jnp.nan, -0.0]), "b": [jnp.float32(1)]},
        {"a": jnp.array([[jnp.nan, -0.0]]), "b": [jnp.int32(1)]},
        {"a": jnp.array([jnp.nan, -0.0]), "c": [jnp.int32(1)]},
    ]
    assert not any(same_bits(tree, other) for other in others)


def test_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert new_folder(tmp_path / "empty", "x") == tmp_path / "empty"
    assert new_folder(tmp_path / "new", "x") == tmp_path / "new"
    assert new_folder(None, "x").parent == Path("runs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]
