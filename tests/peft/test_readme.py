"""The README's lines about PEFT run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from tests.peft.small import P, write

README = Path(__file__).parents[2] / "README.md"


def test_the_lines_about_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fun(p: jl.Adapter, x: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, p["layers"]["q"]["kernel"])
        return x @ p["head"]["kernel"]

    params = {
        "layers": {"q": {"kernel": jnp.ones((2, 3, 3))}},
        "head": {"kernel": jnp.ones((3, 4))},
    }
    module = "model.layers.1.self_attn.q_proj"
    tensors = {
        f"{P}{module}.lora_A.weight": np.ones((2, 3), np.float32),
        f"{P}{module}.lora_B.weight": np.ones((3, 2), np.float32),
    }
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "their-adapter", {"target_modules": [module]}, tensors)
    section = README.read_text().split("## Adapters of Hugging Face PEFT")[1]
    match = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert match is not None
    names = {"jl": jl, "fun": fun, "params": params, "x": jnp.ones((1, 3))}
    exec(match[1], names)
    assert names["paths"] == {f"{module}.weight": "layers/q/kernel"}
    again = jl.peft.load("for-peft", params, names["names"], names["uses"]).adapter
    np.testing.assert_array_equal(
        jl.delta(again)["layers/q/kernel"], jl.delta(names["adapter"])["layers/q/kernel"]
    )
