"""Adapters between PEFT and here, on tiny models: the same logits, and the same tensors again.

Measured: differences of logits of at most 4.1e-6 beside logits of up to 5; the limit is 5e-6. The
controls show that a wrong adapter is far outside of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
load_file = pytest.importorskip("safetensors.numpy").load_file
from tests.interop.peft_models import (  # noqa: E402 - needs the three above
    MODELS,
    QUICK,
    Model,
    base,
    distance,
    logits,
    ours,
    randomized,
)

CLOSE, FAR = 5e-6, 1e-2

pytestmark = [
    # PEFT asks the hub about the base, and says that it could not, or that it saves a table.
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
    # PEFT uses a name that transformers is about to drop.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


IMPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "llama-all-linear": ("llama", {"target_modules": "all-linear"}),
    "llama-rslora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "llama-patterns": (
        "llama",
        {
            "target_modules": r".*\.self_attn\.(q|k|v)_proj",
            "rank_pattern": {"k_proj": 2, r"layers\.1\..*v_proj": 5},
            "alpha_pattern": {"model.layers.0.self_attn.q_proj": 3, "v_proj": 7},
        },
    ),
    "llama-dora": ("llama", {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "llama-embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "llama-embedding-dora": (
        "llama",
        {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    ),
    "llama-saved": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    ),
    "scanned": ("llama-scanned", {"target_modules": ["q_proj", "o_proj", "down_proj"]}),
    "scanned-patterns": (
        "llama-scanned",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 5, r"layers\.0\..*v_proj": 1},
            "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3},
        },
    ),
    "scanned-layer": (
        "llama-scanned",
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    ),
    "scanned-layer-dora": (
        "llama-scanned",
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "use_dora": True},
    ),
    "scanned-saved": (
        "llama-scanned",
        {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp.up_proj"]},
    ),
    "fused": ("llama-fused", {"target_modules": ["q_proj", "v_proj", "up_proj", "o_proj"]}),
    "fused-patterns": (
        "llama-fused",
        {
            "target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj"],
            "rank_pattern": {"k_proj": 1},
            "alpha_pattern": {"v_proj": 2},
        },
    ),
    "fused-dora": (
        "llama-fused",
        {"target_modules": ["q_proj", "k_proj", "gate_proj"], "use_dora": True},
    ),
    "fused-saved": (
        "llama-fused",
        {"target_modules": ["o_proj"], "modules_to_save": ["k_proj", "up_proj"]},
    ),
    "fused-lokr": (
        "llama-fused",
        {"peft_type": "LOKR", "r": 1, "target_modules": ["q_proj", "gate_proj", "up_proj"]},
    ),
    "qwen2": ("qwen2", {"target_modules": ["q_proj", "k_proj", "gate_proj"]}),
    "qwen2-excluded": (
        "qwen2",
        {
            "target_modules": ["q_proj", "k_proj"],
            "exclude_modules": ["layers.0.self_attn.k_proj"],
            "layers_to_transform": [0],
            "layers_pattern": "layers",
        },
    ),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2-dora": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "gpt2-positions": (
        "gpt2",
        {"target_modules": ["c_fc", "wpe"], "fan_in_fan_out": True, "modules_to_save": ["ln_f"]},
    ),
    "tied-tokens": (
        "llama-tied",
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [5, 2]},
        },
    ),
    "tied-copied-tokens": (
        "llama-copied",
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 2]},
    ),
    "gpt2-tokens": (
        "gpt2",
        {"target_modules": ["c_fc"], "fan_in_fan_out": True, "trainable_token_indices": [0, 3]},
    ),
    "gpt2-tied-tokens": (
        "gpt2",
        {
            "target_modules": ["c_fc"],
            "fan_in_fan_out": True,
            "trainable_token_indices": {"wte": [1, 18, 7]},
        },
    ),
    "llama-tokens": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 2]},
    ),
    "llama-tokens-head": (
        "llama",
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [5, 2], "lm_head": [3, 4, 18]},
        },
    ),
    "qwen2-biases": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "qwen2-biases-dora": (
        "qwen2",
        {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only", "use_dora": True},
    ),
    "bert-biases": (
        "bert",
        {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]},
    ),
    "vit-biases": ("vit", {"target_modules": ["projection", "fc1"], "bias": "lora_only"}),
    "llama-loha": ("llama", {"peft_type": "LOHA", "target_modules": ["q_proj", "down_proj"]}),
    "scanned-loha": (
        "llama-scanned",
        {
            "peft_type": "LOHA",
            "target_modules": ["k_proj", "up_proj"],
            "rank_pattern": {r"layers\.1\..*up_proj": 2},
            "alpha_pattern": {"layers.0.mlp.up_proj": 2},
            "modules_to_save": ["lm_head"],
        },
    ),
    "cnn-loha": ("cnn", {"peft_type": "LOHA", "target_modules": ["conv1", "conv2", "head"]}),
    "cnn-loha-tucker": (
        "cnn",
        {
            "peft_type": "LOHA",
            "target_modules": ["conv1", "conv2"],
            "use_effective_conv2d": True,
        },
    ),
    "llama-lokr": ("llama", {"peft_type": "LOKR", "target_modules": ["q_proj", "gate_proj"]}),
    "scanned-lokr": (
        "llama-scanned",
        {
            "peft_type": "LOKR",
            "r": 1,
            "target_modules": ["v_proj", "down_proj"],
            "decompose_both": True,
            "alpha_pattern": {"layers.0.mlp.down_proj": 2},
        },
    ),
    "llama-lokr-factor": (
        "llama",
        {"peft_type": "LOKR", "r": 2, "target_modules": ["q_proj"], "decompose_factor": 2},
    ),
    "cnn-lokr": (
        "cnn",
        {"peft_type": "LOKR", "r": 1, "target_modules": ["conv1", "conv2", "head"]},
    ),
    "cnn-lokr-tucker": (
        "cnn",
        {
            "peft_type": "LOKR",
            "r": 1,
            "target_modules": ["conv1", "conv2"],
            "use_effective_conv2d": True,
        },
    ),
    "bert": ("bert", {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"}),
    "vit": ("vit", {"target_modules": ["q_proj", "fc1"], "modules_to_save": ["classifier"]}),
    "vit-patches": ("vit", {"target_modules": ["projection", "v_proj"]}),
    "cnn": ("cnn", {"target_modules": ["conv1", "conv2", "head"]}),
    "cnn-dora": ("cnn", {"target_modules": ["conv1", "conv2"], "use_dora": True}),
}


def _theirs(peft_type: str = "LORA", **settings: Any) -> Any:
    """PEFT's configuration."""
    if peft_type == "LORA":
        return peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "lora_dropout": 0.1} | settings)
    made = {"LOHA": peft.LoHaConfig, "LOKR": peft.LoKrConfig}[peft_type]
    return made(**{"r": 3, "alpha": 5, "rank_dropout": 0.1} | settings)


@pytest.mark.parametrize("case", IMPORTS)
def test_an_adapter_of_peft_is_the_same_function_here(case: str, tmp_path: Path) -> None:
    which, settings = IMPORTS[case]
    model = MODELS[which]
    config = _theirs(**settings)
    wrapped = peft.get_peft_model(model.torch(), config)
    randomized(wrapped)
    wrapped.eval()
    wrapped.save_pretrained(tmp_path)
    expected = logits(wrapped, model.inputs)

    params, uses, plain = base(which)
    adapter, _, names = jl.peft.load(tmp_path, params, model.names, uses)
    assert distance(ours(model, params, adapter), expected) < CLOSE
    # Controls: the adapter matters, and so does everything in it.
    assert distance(plain(params), expected) > FAR
    assert set(names.values()) == set(adapter)
    assert distance(plain(jl.merge(params, adapter)), expected) < 2 * CLOSE


def _random_adapter(model: Model, params: Any, config: jl.LoraConfig) -> jl.Adapter:
    plan = jl.plan(model.forward, params, jnp.asarray(model.inputs), config=config)
    start = jax.jit(lambda params: jl.init(jax.random.key(0), params, plan), compiler_options=QUICK)
    leaves, treedef = jax.tree.flatten_with_path(start(params))
    rng = np.random.default_rng(1)
    moved = []
    for path, x in leaves:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        y = np.asarray(x)
        if name in ("b", "b2", "g", "d"):
            y = 0.2 * rng.standard_normal(x.shape)
        elif name in ("magnitude", "value"):
            y = y * (1 + 0.2 * rng.random(x.shape))
        moved.append(jnp.asarray(y, x.dtype))
    return jax.tree.unflatten(treedef, moved)


R = jl.Rule
EXPORTS: dict[str, tuple[str, jl.LoraConfig, dict[str, Any]]] = {
    "llama": ("llama", jl.LoraConfig(rank=3, alpha=5), {}),
    "llama-not-flat": (
        "llama",
        jl.LoraConfig(
            targets=(
                R("**/q/kernel", rank=2, alpha=7.5),
                R("**/v/kernel", scaling="rslora"),
                "**/up/*",
            ),
            rank=3,
        ),
        {"flat": False},
    ),
    "llama-ranks": (
        "llama",
        jl.LoraConfig(rank=3, targets=(R("**/q/kernel", rank=6, alpha=1), "**/kernel")),
        {"task_type": "CAUSAL_LM"},
    ),
    "llama-dora": ("llama", jl.LoraConfig(rank=3, alpha=5, variant="dora"), {}),
    "llama-mixed": (
        "llama",
        jl.LoraConfig(
            rank=3,
            targets=(
                R("**/q/kernel", variant="dora"),
                R("**/k/kernel", variant="loha"),
                R("**/v/kernel", variant="lokr"),
                R("**/o/kernel", variant="vera"),
                R("**/up/kernel", init="pissa"),
                R("embed/embedding", rank=2),
                R("norm", variant="full"),
                R("head/kernel", variant="full"),
            ),
        ),
        {},
    ),
    "llama-full": ("llama", jl.LoraConfig(targets=(R("head/kernel", variant="full"),)), {}),
    "llama-rows": (
        "llama",
        jl.LoraConfig(rank=2, targets=(R("embed/embedding", rows=(1, 4, 5)), "**/q/kernel")),
        {},
    ),
    "scanned": ("llama-scanned", jl.LoraConfig(rank=3, alpha=5), {}),
    "scanned-mixed": (
        "llama-scanned",
        jl.LoraConfig(
            rank=3,
            targets=(
                R("**/q/kernel", variant="dora"),
                R("**/down/kernel", init="olora"),
                R("layers/after", variant="full"),
            ),
        ),
        {"flat": False},
    ),
    "fused": (
        "llama-fused",
        jl.LoraConfig(
            rank=2, targets=("**/qkv/*", R("**/gating", rank=1), R("**/down/*", variant="full"))
        ),
        {},
    ),
    "fused-dora": (
        "llama-fused",
        jl.LoraConfig(rank=2, targets=("**/qkv/*", "**/gating"), variant="dora"),
        {"flat": False},
    ),
    "fused-full": (
        "llama-fused",
        jl.LoraConfig(rank=2, targets=(R("layers/1/qkv/*", variant="full"), "**/o/*")),
        {},
    ),
    "tied-rows": (
        "llama-tied",
        jl.LoraConfig(rank=2, targets=(R("**embed**", rows=(1, 18)), "**q_proj**")),
        {},
    ),
    "biases": (
        "qwen2",
        jl.LoraConfig(
            rank=2, targets=(R("**q_proj.bias", variant="full"), "**q_proj.weight", "**o_proj**")
        ),
        {},
    ),
    "biases-everywhere": (
        "bert",
        jl.LoraConfig(
            rank=2,
            targets=(
                R("bert.encoder**.bias", variant="full"),
                "**.query.weight",
            ),
        ),
        {"flat": False},
    ),
    "qwen2": ("qwen2", jl.LoraConfig(rank=2), {}),
    "gpt2": (
        "gpt2",
        jl.LoraConfig(
            rank=2, targets=("**.c_*.weight", R("transformer.ln_f.bias", variant="full"))
        ),
        {},
    ),
    "gpt2-dora": (
        "gpt2",
        jl.LoraConfig(rank=2, targets=("**.c_*.weight", "**.wpe.weight"), variant="dora"),
        {},
    ),
    "bert": (
        "bert",
        jl.LoraConfig(rank=2, targets=(R("classifier.weight", variant="full"), "all-linear")),
        {"task_type": "SEQ_CLS"},
    ),
    "vit": ("vit", jl.LoraConfig(rank=2, targets=("all-linear", "all-convolution")), {}),
    "cnn": ("cnn", jl.LoraConfig(rank=2, targets=("all-linear", "all-convolution")), {}),
    "cnn-dora": ("cnn", jl.LoraConfig(rank=2, variant="dora", targets=("all-convolution",)), {}),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_peft_loads_an_adapter_of_ours(case: str, tmp_path: Path) -> None:
    which, config, settings = EXPORTS[case]
    model = MODELS[which]
    params, uses, plain = base(which)
    adapter = _random_adapter(model, params, config)
    expected = ours(model, params, adapter)
    jl.peft.save(tmp_path / "ours", adapter, params, model.names, uses, **settings)

    wrapped = peft.PeftModel.from_pretrained(model.torch(), tmp_path / "ours").eval()
    assert distance(logits(wrapped, model.inputs), expected) < CLOSE
    assert distance(plain(params), expected) > FAR

    wrapped.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    file = "adapter_model.safetensors"
    before, after = (load_file(tmp_path / name / file) for name in ("ours", "theirs"))
    assert before.keys() == after.keys()
    for name, x in before.items():
        np.testing.assert_array_equal(after[name], x, err_msg=name)
    stored = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    if settings.get("flat", True):
        assert stored["r"] == stored["lora_alpha"]
        assert (stored["rank_pattern"], stored["alpha_pattern"]) == ({}, {})

    # And back, from both.
    for name in ("ours", "theirs"):
        again = jl.peft.load(tmp_path / name, params, model.names, uses).adapter
        assert distance(ours(model, params, again), expected) < CLOSE
