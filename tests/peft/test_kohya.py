"""Files of kohya's scripts, against the formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jax_lora as jl
from jax_lora.errors import CheckpointError
from jax_lora.peft.tensors import write_tensors
from tests.peft.small import NAMES, World


def _tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "lora_head.lora_down.weight": normal(2, 6),
        "lora_head.lora_up.weight": normal(3, 2),
        "lora_head.alpha": np.float32(1).reshape(()),
        "lora_layers_1_fc.lora_down.weight": normal(3, 4, 1, 1),
        "lora_layers_1_fc.lora_up.weight": normal(4, 3, 1, 1),
        "lora_conv.lora_down.weight": normal(2, 4, 2),
        "lora_conv.lora_up.weight": normal(6, 2, 1),
        "lora_conv.alpha": np.float32([3]),
    }


def _load(world: World, file: Path, **settings: Any) -> jl.Adapter:
    return jl.peft.load_kohya(file, world.params, NAMES, world.uses, **settings).adapter


def test_the_update_is_the_formula(world: World, tmp_path: Path) -> None:
    tensors = _tensors()
    write_tensors(tmp_path / "x.safetensors", tensors)
    found = jl.delta(_load(world, tmp_path / "x.safetensors"))
    assert set(found) == {"head/kernel", "layers/w", "conv/kernel"}

    def product(module: str) -> np.ndarray:
        down, up = (tensors[f"{module}.lora_{x}.weight"].astype(np.float64) for x in ("down", "up"))
        return np.einsum("or,r...->o...", up.reshape(up.shape[0], -1), down)

    close = {"rtol": 1e-6, "atol": 1e-6}
    np.testing.assert_allclose(found["head/kernel"], product("lora_head").T / 2, **close)
    assert not np.asarray(found["layers/w"][0]).any()
    layer = product("lora_layers_1_fc")[..., 0, 0].T  # no alpha: the scale is 1
    np.testing.assert_allclose(found["layers/w"][1], layer, **close)
    kernel = product("lora_conv").transpose(2, 1, 0) * 1.5
    np.testing.assert_allclose(found["conv/kernel"], kernel, **close)


def test_another_prefix(world: World, tmp_path: Path) -> None:
    tensors = {key.replace("lora_", "lycoris_", 1): x for key, x in _tensors().items()}
    write_tensors(tmp_path / "x.safetensors", tensors)
    assert set(_load(world, tmp_path / "x.safetensors", prefix="lycoris_"))
    with pytest.raises(CheckpointError, match=r"lycoris_conv\.alpha: no module"):
        _load(world, tmp_path / "x.safetensors")


def test_all_that_does_not_fit_is_one_error(world: World, tmp_path: Path) -> None:
    tensors = _tensors()
    tensors["lora_head.dora_scale"] = np.ones((3, 1), np.float32)
    tensors["lora_head.diff"] = np.ones((3, 6), np.float32)
    tensors["lora_layers_2_fc.alpha"] = np.ones((), np.float32)
    del tensors["lora_conv.lora_up.weight"]
    tensors["lora_layers_1_fc.lora_up.weight"] = np.ones((4, 2), np.float32)
    write_tensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(CheckpointError) as caught:
        _load(world, tmp_path / "x.safetensors")
    lines = str(caught.value).splitlines()[1:]
    for part in (
        "lora_head.dora_scale: expected a key of LoRA",
        "lora_head.diff: expected a key of LoRA",
        "lora_layers_2_fc.alpha: no module is called 'lora_layers_2_fc'",
        "conv: expected lora_down and lora_up, or the tensors of LoHa or LoKr, found alpha, lora_",
        "layers.1.fc.weight: expected B of shape (4, 3), found (4, 2)",
    ):
        assert any(part in line for line in lines), (part, lines)
    assert len(lines) == 5
    write_tensors(tmp_path / "none.safetensors", {})
    with pytest.raises(CheckpointError, match="expected keys of LoRA, found none"):
        _load(world, tmp_path / "none.safetensors")
