"""A small base, and adapters for it as PEFT has them, one for each method and variant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

import jax_lora as jl
from jax_lora.experiments.fuzzing.formulas import Tensors

Name = jl.peft.Name
_P = "base_model.model."


def _params(rng: np.random.Generator) -> dict[str, Any]:
    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "table": normal(7, 4),
        "layers": {"w": normal(2, 4, 4), "b": normal(2, 4)},
        "conv": {"kernel": normal(2, 4, 6)},
        "head": {"kernel": normal(6, 3), "bias": normal(3)},
    }


BASE = _params(np.random.default_rng(0))
NAMES = (
    Name("table", "embed.weight", "embedding"),
    Name("layers/w", "layers.{layer}.fc.weight", "linear", "io"),
    Name("layers/b", "layers.{layer}.fc.bias"),
    Name("conv/kernel", "conv.weight", "conv", "wio"),
    Name("head/kernel", "head.weight", "linear", "io"),
    Name("head/bias", "head.bias"),
)
_SAME: Callable[[Any], Any] = lambda x: x  # noqa: E731
#: By torch's name: our path, the place in the stack, and how torch has what we have.
PLACES: dict[str, tuple[str, Any, Callable[[Any], Any]]] = {
    "embed.weight": ("table", ..., _SAME),
    **{f"layers.{k}.fc.weight": ("layers/w", k, np.transpose) for k in range(2)},
    **{f"layers.{k}.fc.bias": ("layers/b", k, _SAME) for k in range(2)},
    "conv.weight": ("conv/kernel", ..., lambda x: x.transpose(2, 1, 0)),
    "head.weight": ("head/kernel", ..., np.transpose),
    "head.bias": ("head/bias", ..., _SAME),
}
_SHAPES = {"head": (3, 6), "layers.0.fc": (4, 4), "layers.1.fc": (4, 4), "conv": (6, 4, 2)}


def _lora(seed: int, **dtypes: Any) -> tuple[dict[str, Any], Tensors]:
    draw = Draw(seed)
    tensors = {}
    for module, (out, *ins) in _SHAPES.items():
        rank = 3 if module == "layers.1.fc" else 2
        ones = (1,) * (len(ins) - 1)
        tensors[f"{_P}{module}.lora_A.weight"] = draw(rank, *ins, dtype=dtypes.get("dtype"))
        tensors[f"{_P}{module}.lora_B.weight"] = draw(out, rank, *ones, dtype=dtypes.get("dtype"))
    config = {
        "target_modules": ["head", "fc", "conv"],
        "rank_pattern": {r"layers\.1\.fc": 3},
        "alpha_pattern": {"^layers.0": 2, "head": 7.5},
        "use_rslora": seed % 2 == 0,
    }
    return config, tensors


def _half(seed: int) -> tuple[dict[str, Any], Tensors]:
    return _lora(seed, dtype=(jnp.bfloat16, np.float16)[seed % 2])


def _dora(seed: int) -> tuple[dict[str, Any], Tensors]:
    config, tensors = _lora(seed)
    draw = Draw(seed + 10)
    for module, (out, *ins) in _SHAPES.items():
        shape = (1, out, 1) if len(ins) > 1 else (out,)
        tensors[f"{_P}{module}.lora_magnitude_vector"] = draw(*shape)
    return config | {"use_dora": True, "target_modules": r"(head|conv|layers\.\d+\.fc)"}, tensors


def _whole(seed: int) -> tuple[dict[str, Any], Tensors]:
    """Modules and biases that are trained whole, rows of a table, and one layer of two."""
    draw = Draw(seed)
    tensors = {
        f"{_P}layers.1.fc.lora_A.weight": draw(2, 4),
        f"{_P}layers.1.fc.lora_B.weight": draw(4, 2),
        f"{_P}layers.1.fc.base_layer.bias": draw(4),
        f"{_P}head.weight": draw(3, 6),
        f"{_P}head.bias": draw(3),
        f"{_P}embed.token_adapter.trainable_tokens_delta": draw(3, 4),
    }
    config = {
        "target_modules": ["fc"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
        "modules_to_save": ["head"],
        "bias": "lora_only",
        "trainable_token_indices": {"embed": [1, 6, 3]},
    }
    return config, tensors


def _table(seed: int) -> tuple[dict[str, Any], Tensors]:
    draw = Draw(seed)
    tensors = {
        f"{_P}embed.lora_embedding_A": draw(2, 7),
        f"{_P}embed.lora_embedding_B": draw(4, 2),
    }
    return {"target_modules": ["embed"], "exclude_modules": ["head"]}, tensors


def _loha(seed: int) -> tuple[dict[str, Any], Tensors]:
    draw = Draw(seed)
    tensors = {}
    for module in ("head", "layers.0.fc", "layers.1.fc"):
        out, *ins = _SHAPES[module]
        for k in "12":
            tensors[f"{_P}{module}.hada_w{k}_a"] = draw(out, 2)
            tensors[f"{_P}{module}.hada_w{k}_b"] = draw(2, int(np.prod(ins)))
    for k in "12":
        tensors[f"{_P}conv.hada_w{k}_a"], tensors[f"{_P}conv.hada_w{k}_b"] = draw(2, 6), draw(2, 4)
        tensors[f"{_P}conv.hada_t{k}"] = draw(2, 2, 2)
    config = {"peft_type": "LOHA", "alpha": 3, "target_modules": ["head", "fc", "conv"]}
    return config, tensors


def _lokr(seed: int) -> tuple[dict[str, Any], Tensors]:
    draw = Draw(seed)
    tensors = {
        f"{_P}head.lokr_w1": draw(1, 2),
        f"{_P}head.lokr_w2_a": draw(3, 2),
        f"{_P}head.lokr_w2_b": draw(2, 3),
        f"{_P}layers.0.fc.lokr_w1_a": draw(2, 2),
        f"{_P}layers.0.fc.lokr_w1_b": draw(2, 2),
        f"{_P}layers.0.fc.lokr_w2": draw(2, 2),
        f"{_P}layers.1.fc.lokr_w1": draw(4, 1),
        f"{_P}layers.1.fc.lokr_w2": draw(1, 4),
        f"{_P}conv.lokr_w1": draw(2, 2),
        f"{_P}conv.lokr_w2": draw(3, 2, 2),
    }
    config = {"peft_type": "LOKR", "alpha": 3, "target_modules": ["head", "fc", "conv"]}
    return config, tensors


PEFT: dict[str, Callable[[int], tuple[dict[str, Any], Tensors]]] = {
    "peft lora": _lora,
    "peft half": _half,
    "peft dora": _dora,
    "peft whole": _whole,
    "peft table": _table,
    "peft loha": _loha,
    "peft lokr": _lokr,
}


class Draw:
    """Normal tensors, one after another."""

    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)

    def __call__(self, *shape: int, dtype: Any = None) -> np.ndarray:
        """The next, in float32 or another dtype."""
        return self._rng.standard_normal(shape).astype(dtype or np.float32)
