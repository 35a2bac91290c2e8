"""A small model with an embedding, a stack of two layers, a convolution and a head."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_lora as jl

#: What PEFT puts before every key.
P = "base_model.model."
NAMES = (
    jl.peft.Name("table", "embed.weight"),
    jl.peft.Name("layers/w", "layers.{layer}.fc.weight"),
    jl.peft.Name("layers/b", "layers.{layer}.fc.bias"),
    jl.peft.Name("conv/kernel", "conv.weight"),
    jl.peft.Name("head/kernel", "head.weight"),
    jl.peft.Name("head/bias", "head.bias"),
)
TOKENS = np.array([[1, 0, 5, 3, 2], [6, 6, 4, 1, 0]])


def forward(params: Any, tokens: Any) -> Any:
    """``[n, t] -> [n, 3]``: look up, two layers of a scan, a convolution over time, a head."""
    x = params["table"][tokens]

    def layer(x: Any, p: Any) -> Any:
        return jnp.tanh(x @ p["w"] + p["b"]), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    x = jax.lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return x.mean(1) @ params["head"]["kernel"] + params["head"]["bias"]


@dataclasses.dataclass(frozen=True)
class World:
    """The model, its parameters, their uses, and a way to make files of adapters."""

    params: Any
    uses: Any

    def ours(self, adapter: jl.Adapter) -> np.ndarray:
        """The adapted function's outputs."""
        return np.asarray(jl.apply(forward)(self.params, adapter, jnp.asarray(TOKENS)))

    def load(self, folder: Path, **settings: Any) -> jl.Adapter:
        """The adapter of a folder."""
        return jl.peft.load(folder, self.params, NAMES, self.uses, **settings).adapter

    def save(self, folder: Path, adapter: jl.Adapter, **settings: Any) -> dict[str, str]:
        """The adapter into a folder."""
        return jl.peft.save(folder, adapter, self.params, NAMES, self.uses, **settings)

    def adapter(self, **settings: Any) -> jl.Adapter:
        """A random one."""
        config = jl.LoraConfig(**{"rank": 2, "alpha": 3.0} | settings)
        plan = jl.plan(forward, self.params, jnp.asarray(TOKENS), config=config)
        fresh = jl.init(jax.random.key(0), self.params, plan)
        leaves, treedef = jax.tree.flatten_with_path(fresh)
        rng = np.random.default_rng(1)
        fixed = ("scale", "base_norm")
        moved = [
            x if path[-1].name in fixed else jnp.asarray(rng.standard_normal(x.shape), x.dtype)
            for path, x in leaves
        ]
        return jax.tree.unflatten(treedef, moved)


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    """A folder as PEFT writes it, by a writer of safetensors that is not the library's."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "bias": "none"} | dict(config)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    header: dict[str, Any] = {}
    data = b""
    kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32"}
    for name, x in tensors.items():
        places = [len(data), len(data) + x.nbytes]
        header[name] = {"dtype": kinds[str(x.dtype)], "shape": x.shape, "data_offsets": places}
        data += x.tobytes()
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + data
    )
    return folder
