"""Checkpoints that earlier versions of the format wrote can be read, with the same bits."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_lora as jl
from jax_lora.io import files

GOLDEN = Path(__file__).parents[1] / "golden"
RELEASED = Path(__file__).parents[2] / "checkpoints" / "cifar10-mlp"


@pytest.fixture(scope="module")
def make() -> ModuleType:
    """The program that wrote them: what has to come back."""
    spec = importlib.util.spec_from_file_location("make", GOLDEN / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def version_of(folder: Path) -> Any:
    return json.loads((folder / "config" / "metadata").read_text())["version"]


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


@pytest.mark.parametrize("version", [2, 3])
def test_an_adapter(make: ModuleType, version: int) -> None:
    folder = GOLDEN / f"v{version}" / "adapter"
    assert version_of(folder) == version
    adapter, config, metadata = jl.io.load_adapter(folder, make.base())
    assert_same(adapter, make.adapter())
    assert (config, metadata) == (make.CONFIG, {"by": "make.py"})


def test_the_released_ones_have_the_first_version() -> None:
    """The adapter of version 1 knows nothing of its base, so any that it fits will do."""
    assert version_of(RELEASED / "adapter") == 1
    params, _ = jl.io.load_params(RELEASED / "base")
    adapter, config, _ = jl.io.load_adapter(RELEASED / "adapter", params)
    assert adapter.trainable_params == 115_008
    assert config is not None
    assert config.rank == adapter["params/l1/kernel"].rank == 32
    other = jax.tree.map(lambda x: x + 1, params)
    assert jl.io.load_adapter(RELEASED / "adapter", other)[0].keys() == adapter.keys()


@pytest.mark.parametrize("version", [2, 3])
def test_only_the_newer_know_their_base(make: ModuleType, version: int) -> None:
    folder = GOLDEN / f"v{version}" / "adapter"
    other = make.base() | {"bias": jnp.ones(3)}
    if version == 2:
        jl.io.load_adapter(folder, other)
        return
    with pytest.raises(jl.AdapterError, match="bias: other values"):
        jl.io.load_adapter(folder, other)


def test_a_training(make: ModuleType) -> None:
    saved = jl.io.Checkpoints(GOLDEN / "v3" / "training", base=make.base(), config=make.CONFIG)
    state = make.optimizer().init(make.adapter())
    found = saved.restore(make.adapter(), state)
    assert_same(found.trained, make.adapter())
    assert_same(found.opt_state, jax.tree.map(lambda x: x + 1, state))
    assert (found.step, found.metrics) == (7, {"accuracy": 0.25})
    assert found.position == jl.io.Position(epoch=1, step=2, batch_size=8, examples=40)
    assert found.keys["run"] == jax.random.key(3)
    assert found.metadata == {"by": "make.py"}


def test_the_newest_is_there() -> None:
    """Whoever raises the version writes a golden checkpoint of it."""
    assert version_of(GOLDEN / f"v{files.VERSION}" / "training" / "7") == files.VERSION
    assert tuple(range(1, files.VERSION + 1)) == files.READABLE


def test_they_are_seen_if_they_change(make: ModuleType, tmp_path: Path) -> None:
    """The control: another adapter is not this one."""
    shutil.copytree(GOLDEN / "v3" / "training", tmp_path / "training")
    saved = jl.io.Checkpoints(tmp_path / "training")
    adapter = make.adapter()
    found = saved.restore(adapter, make.optimizer().init(adapter))
    with pytest.raises(AssertionError):
        assert_same(found.trained, jax.tree.map(lambda x: x + 1, adapter))
    with pytest.raises(jl.CheckpointError, match="optimizer state"):
        saved.restore(adapter, jl.optim.lora_optimizer(optax.sgd(0.1)).init(adapter))
