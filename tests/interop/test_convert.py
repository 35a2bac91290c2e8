"""The script between real files of transformers and PEFT, from its command line."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("tyro")

from tests.interop.peft_models import (  # noqa: E402 - needs the four above
    MODELS,
    base,
    distance,
    logits,
    ours,
    randomized,
)

CLOSE, FAR = 5e-6, 1e-2
SCRIPT = Path(jl.__file__).parents[1] / "scripts" / "convert.py"

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning"
    ),  # orbax closes its threads when collected
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def convert(*arguments: Any) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(SCRIPT), run_name="__main__")
    assert isinstance(caught.value.code, int)
    return caught.value.code


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": ["q_proj"], "use_dora": True}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "wpe"], "fan_in_fan_out": True}),
    "bert": ("bert", {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS", "bias": "all"}),
    "vit": ("vit", {"target_modules": ["projection", "fc1"], "modules_to_save": ["classifier"]}),
}


#: Where transformers calls a module otherwise than its file does.
_BLOCK, _FILE = "vit.layers.{n}.", "vit.encoder.layer.{n}."
VIT = [
    {"path": f"{_FILE}{path}.{{p}}", "name": f"{_BLOCK}{name}.{{p}}"}
    for path, name in (
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
        ("layernorm_before", "layernorm_before"),
        ("layernorm_after", "layernorm_after"),
    )
]


@pytest.mark.parametrize("case", CASES)
def test_from_files_of_torch_and_back(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is at hand but a base as from_pretrained reads it, and PEFT's folder."""
    which, settings = CASES[case]
    model = MODELS[which]
    plain = model.torch()
    plain.save_pretrained(tmp_path / "base", max_shard_size="10KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    wrapped = peft.get_peft_model(plain, peft.LoraConfig(r=3, lora_alpha=5, **settings))
    randomized(wrapped)
    wrapped.eval().save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    expected = logits(wrapped, model.inputs)
    assert distance(logits(model.torch(), model.inputs), expected) > FAR

    (tmp_path / "names.json").write_text(json.dumps(VIT))
    names = ("--names", tmp_path / "names.json") if which == "vit" else ()
    here = ("--base", tmp_path / "base", "--adapter", tmp_path / "theirs")
    assert convert("to-checkpoint", *here, *names, "--out", tmp_path / "ours") == 0
    table = capsys.readouterr().out
    assert table.startswith("torch ")
    assert "rank 3" in table
    # Parameters with torch's own names and shapes.
    state = {name: jnp.asarray(x.numpy()) for name, x in model.torch().state_dict().items()}
    if which in ("gpt2", "bert"):
        params = model.params({name: np.asarray(x) for name, x in state.items()})
        params = {name: jnp.asarray(x) for name, x in params.items()}
        adapter, _, _ = jl.io.load_adapter(tmp_path / "ours", params)
        assert distance(ours(model, params, adapter), expected) < CLOSE

    needs_base = ("--base", tmp_path / "base", *names) if settings.get("bias") else ()
    to_peft = ("--adapter", tmp_path / "ours", "--out", tmp_path / "again", *needs_base)
    assert convert("to-peft", *to_peft) == 0
    again = peft.PeftModel.from_pretrained(model.torch(), tmp_path / "again").eval()
    assert distance(logits(again, model.inputs), expected) < CLOSE

    for name, adapter_folder in (("one", "theirs"), ("other", "ours")):
        arguments = ("--base", tmp_path / "base", "--adapter", tmp_path / adapter_folder)
        out = tmp_path / name
        assert convert("to-weights", *arguments, *names, "--shard-gb", 1e-5, "--out", out) == 0
        assert len(list(out.glob("*.safetensors"))) > 1
        plain.config.save_pretrained(out)
        merged = type(model.torch()).from_pretrained(out).eval()
        assert distance(logits(merged, model.inputs), expected) < 2 * CLOSE


def test_with_a_base_of_ours_and_a_file_of_rules(tmp_path: Path) -> None:
    """A scanned model whose parameters are a checkpoint of this library."""
    model = MODELS["llama-scanned"]
    params = base("llama-scanned")[0]
    jl.io.save_params(tmp_path / "base", params)
    wrapped = peft.get_peft_model(
        model.torch(), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"])
    )
    randomized(wrapped)
    wrapped.eval().save_pretrained(tmp_path / "theirs")
    expected = logits(wrapped, model.inputs)

    rules = []
    for rule in model.names:
        matrix = rule.path.endswith("kernel")
        table = "kind = 'embedding'\n" if "embedding" in rule.path else ""
        kind = "kind = 'linear'\naxes = 'io'\n" if matrix else table
        rules.append(f"[[names]]\npath = '{rule.path}'\nname = '{rule.name}'\n{kind}")
    (tmp_path / "names.toml").write_text("\n".join(rules))
    here = ("--base", tmp_path / "base", "--names", tmp_path / "names.toml")
    theirs = ("--adapter", tmp_path / "theirs")
    assert convert("to-checkpoint", *here, *theirs, "--out", tmp_path / "ours") == 0
    adapter, _, _ = jl.io.load_adapter(tmp_path / "ours", params)
    assert set(adapter) == {"layers/q/kernel", "layers/down/kernel"}
    assert distance(ours(model, params, adapter), expected) < CLOSE
    # Back without the base: names and axes are in the checkpoint.
    to_peft = ("--adapter", tmp_path / "ours", "--out", tmp_path / "again", "--no-flat")
    assert convert("to-peft", *to_peft) == 0
    again = peft.PeftModel.from_pretrained(model.torch(), tmp_path / "again").eval()
    assert distance(logits(again, model.inputs), expected) < CLOSE
    # An adapter of this library that has never been PEFT's, with the same rules.
    jl.io.save_adapter(tmp_path / "fresh", adapter)
    fresh = ("--adapter", tmp_path / "fresh", "--names", tmp_path / "names.toml")
    assert convert("to-peft", *fresh, "--out", tmp_path / "third") == 0
    third = peft.PeftModel.from_pretrained(model.torch(), tmp_path / "third").eval()
    assert distance(logits(third, model.inputs), expected) < CLOSE
    out = tmp_path / "merged"
    assert convert("to-weights", *here, "--adapter", tmp_path / "ours", "--out", out) == 0
    model.torch().config.save_pretrained(out)
    merged = transformers.LlamaForCausalLM.from_pretrained(out).eval()
    assert distance(logits(merged, model.inputs), expected) < 2 * CLOSE
