"""The lines about PEFT in the README and in docs/ run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.peft.weights import open_weights
from tests.peft.small import NAMES, P, World, write

README = Path(__file__).parents[2] / "README.md"
PAGE = README.parent / "docs" / "peft.md"
SECTION = README.read_text().split("## Adapters of Hugging Face PEFT")[1].split("## How it")[0]


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
    match = re.search(r"```python\n(.*?)```", SECTION, re.DOTALL)
    assert match is not None
    names = {"jl": jl, "fun": fun, "params": params, "x": jnp.ones((1, 3))}
    exec(match[1], names)
    assert names["paths"] == {f"{module}.weight": "layers/q/kernel"}
    again = jl.peft.load("for-peft", params, names["names"], names["uses"]).adapter
    np.testing.assert_array_equal(
        jl.delta(again)["layers/q/kernel"], jl.delta(names["adapter"])["layers/q/kernel"]
    )


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of orbax, when collected
def test_the_commands(
    world: World,
    tensors: dict[str, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As they stand, one after the other; and what is wrong is one error with exit code 2."""
    pytest.importorskip("tyro")
    from jax_lora.experiments.cli import main
    from jax_lora.peft.convert import Conversion, convert

    monkeypatch.chdir(tmp_path)
    write(tmp_path / "their-adapter", {"target_modules": ["head", "fc"]}, tensors)
    jl.peft.save_weights("their-model", world.params, NAMES, world.uses)
    commands = re.findall(r"^    python scripts/convert\.py (.*)$", PAGE.read_text(), re.MULTILINE)
    assert [command.split()[0] for command in commands] == [
        "to-checkpoint",
        "to-peft",
        "to-weights",
    ]
    for command in commands:
        assert main(Conversion, convert, command.split(), failure=2) == 0
    adapter = world.load(tmp_path / "their-adapter")
    np.testing.assert_allclose(
        jl.delta(world.load(tmp_path / "for-peft"))["layers/w"], jl.delta(adapter)["layers/w"], 1e-6
    )
    jl.peft.save_weights("expected", jl.merge(world.params, adapter), NAMES, world.uses)
    found, expected = (open_weights(tmp_path / name) for name in ("merged", "expected"))
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-6, atol=1e-6)
    capsys.readouterr()
    # A second time: the folders are there.
    for command in commands:
        assert main(Conversion, convert, command.split(), failure=2) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert "it holds something; choose another" in err
    tensors[f"{P}hed.lora_A.weight"] = np.ones((1, 1), np.float32)
    tensors[f"{P}head.lora_A.weight"] = np.ones((3, 6), np.float32)
    write(tmp_path / "their-adapter", {"target_modules": ["head", "fc"]}, tensors)
    assert main(Conversion, convert, [*commands[0].split()[:-1], "new"], failure=2) == 2
    err = capsys.readouterr().err
    assert "hed.lora_A.weight: no module is called 'hed' (nearest: 'head'" in err
    assert "head.weight: expected A of shape (2, 6), found (3, 6)" in err
    assert not (tmp_path / "new").exists()
