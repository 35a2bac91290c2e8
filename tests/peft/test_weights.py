"""Whole parameters under torch's names, in one file or in shards."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.errors import CheckpointError
from jax_lora.peft.tensors import TensorFile
from tests.peft.small import NAMES, World


def _expected(world: World) -> dict[str, np.ndarray]:
    params = jax.tree.map(np.asarray, world.params)
    return {
        "embed.weight": params["table"],
        "layers.0.fc.weight": params["layers"]["w"][0].T,
        "layers.1.fc.weight": params["layers"]["w"][1].T,
        "layers.0.fc.bias": params["layers"]["b"][0],
        "layers.1.fc.bias": params["layers"]["b"][1],
        "conv.weight": params["conv"]["kernel"].transpose(2, 1, 0),
        "head.weight": params["head"]["kernel"].T,
        "head.bias": params["head"]["bias"],
    }


def test_one_file(world: World, tmp_path: Path) -> None:
    names = jl.peft.save_weights(tmp_path / "out", world.params, NAMES, world.uses)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    file = TensorFile.open(tmp_path / "out" / "model.safetensors")
    assert file.metadata == {"format": "pt"}
    expected = _expected(world)
    assert set(file.tensors) == set(expected) == set(names)
    for name, x in expected.items():
        np.testing.assert_array_equal(file.read(name), x)


@pytest.mark.parametrize("limit", [1, 100, 200, 500])
def test_shards(world: World, tmp_path: Path, limit: int) -> None:
    folder = tmp_path / "out"
    jl.peft.save_weights(folder, world.params, NAMES, world.uses, shard_bytes=limit)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    expected = _expected(world)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in expected.values())
    assert set(index["weight_map"]) == set(expected)
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    count = len(files)
    assert files == [f"model-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]
    assert count > 1
    for name in files:
        file = TensorFile.open(folder / name)
        held = [x for x, where in index["weight_map"].items() if where == name]
        assert set(file.tensors) == set(held)
        size = sum(expected[x].nbytes for x in held)
        assert size <= limit or len(held) == 1
        for x in held:
            np.testing.assert_array_equal(file.read(x), expected[x])


def test_dtypes_are_kept(world: World, tmp_path: Path) -> None:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), world.params)
    jl.peft.save_weights(tmp_path / "out", params, NAMES, world.uses)
    file = TensorFile.open(tmp_path / "out" / "model.safetensors")
    assert {x.dtype for x in file.tensors.values()} == {"BF16"}
    np.testing.assert_array_equal(file.read("head.bias"), params["head"]["bias"])


def test_what_cannot_be_written_is_one_error(world: World, tmp_path: Path) -> None:
    params = world.params | {"extra": jnp.zeros(2), "count": jnp.zeros((), jnp.complex64)}
    names = (*NAMES[1:], ("count", "count"))
    uses = {path: x for path, x in world.uses.items() if path != "head/kernel"}
    with pytest.raises(CheckpointError) as caught:
        jl.peft.save_weights(tmp_path / "out", params, names, uses, shard_bytes=0)
    text = str(caught.value)
    for part in (
        "table: no rule names it",
        "extra: no rule names it",
        "count: expected a dtype that safetensors has, got complex64",
        "head/kernel: the roles of its axes are not known",
        "expected shard_bytes to be a positive integer, got 0",
    ):
        assert part in text
    assert not list(tmp_path.iterdir())
