"""What PEFT, safetensors and transformers make of the same files and settings."""

from __future__ import annotations

import re
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
load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file

from tests.interop.peft_models import (  # noqa: E402 - needs the four above
    MODELS,
    base,
    distance,
    logits,
    ours,
    randomized,
)

CLOSE, FAR = 5e-6, 1e-2
FILE = "adapter_model.safetensors"

pytestmark = [
    # PEFT asks the hub about the base, and says that it could not.
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
    # PEFT uses a name that transformers is about to drop.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def _trained(wrapped: Any, inputs: np.ndarray, steps: int = 5) -> None:
    """A few steps of PEFT's own training."""
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    wrapped.train()
    tokens = torch.from_numpy(inputs)
    for _ in range(steps):
        optimizer.zero_grad()
        wrapped(tokens, labels=tokens).loss.backward()
        optimizer.step()
    wrapped.eval()


def test_an_adapter_that_peft_trained(tmp_path: Path) -> None:
    model = MODELS["llama-scanned"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    wrapped = peft.get_peft_model(model.torch(), config)
    _trained(wrapped, model.inputs)
    wrapped.save_pretrained(tmp_path)
    params, uses, plain = base("llama-scanned")
    adapter = jl.peft.load(tmp_path, params, model.names, uses).adapter
    expected = logits(wrapped, model.inputs)
    assert distance(ours(model, params, adapter), expected) < CLOSE
    assert distance(plain(params), expected) > FAR


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_changed_its_base(start: str, tmp_path: Path) -> None:
    """On the base as it was, the difference of both adapters is the trained model."""
    model = MODELS["llama-scanned"]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=start
    )
    wrapped = peft.get_peft_model(model.torch(), config)
    wrapped.save_pretrained(tmp_path / "start")
    _trained(wrapped, model.inputs)
    wrapped.save_pretrained(tmp_path / "trained")
    expected = logits(wrapped, model.inputs)
    params, uses, plain = base("llama-scanned")

    with pytest.raises(jl.CheckpointError, match="PEFT subtracted the factors at the start"):
        jl.peft.load(tmp_path / "trained", params, model.names, uses)
    found = jl.peft.load(
        tmp_path / "trained", params, model.names, uses, start=tmp_path / "start"
    ).adapter
    assert distance(ours(model, params, found), expected) < CLOSE
    assert distance(plain(params), expected) > FAR

    # What PEFT converts itself is the same, and so is ours when it is read by PEFT.
    jl.peft.save(tmp_path / "plain", found, params, model.names, uses)
    again = peft.PeftModel.from_pretrained(model.torch(), tmp_path / "plain").eval()
    assert distance(logits(again, model.inputs), expected) < CLOSE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_peft_keeps_every_bit(dtype: str, tmp_path: Path) -> None:
    model = MODELS["llama"]
    params, uses, _ = base("llama")
    config = jl.LoraConfig(rank=3, alpha=6, dtype=dtype)
    plan = jl.plan(model.forward, params, jnp.asarray(model.inputs), config=config)
    adapter = jl.init(jax.random.key(0), params, plan)
    adapter = jax.tree.map(lambda x: x if x.ndim == 0 else x + jnp.asarray(0.3, x.dtype), adapter)
    jl.peft.save(tmp_path / "ours", adapter, params, model.names, uses)
    wrapped = peft.PeftModel.from_pretrained(
        model.torch().to(getattr(torch, dtype)), tmp_path / "ours", autocast_adapter_dtype=False
    )
    wrapped.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    before, after = (load_file(tmp_path / name / FILE) for name in ("ours", "theirs"))
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert x.dtype == getattr(torch, dtype)
        assert torch.equal(after[name], x), name
    a = before["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    expected = np.asarray(adapter["layers_0/q/kernel"].a.astype(jnp.float32)).T
    np.testing.assert_array_equal(a.float().numpy(), expected)


def test_the_format_is_that_of_safetensors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        f"{dtype} {shape}": np.asarray(rng.standard_normal(shape), dtype)
        for dtype in (np.float32, np.float16, np.float64, jnp.bfloat16)
        for shape in ((), (3,), (2, 5), (1, 2, 3), (0, 2))
    }
    jl.peft.tensors.write_tensors(tmp_path / "ours", tensors)
    found = load_file(tmp_path / "ours")
    save_file(found, tmp_path / "theirs", metadata={"format": "pt"})
    again = jl.peft.tensors.TensorFile.open(tmp_path / "theirs")
    assert set(found) == set(tensors) == set(again.tensors)
    assert again.metadata == {"format": "pt"}
    for name, x in tensors.items():
        assert tuple(found[name].shape) == x.shape
        np.testing.assert_array_equal(found[name].double().numpy(), x.astype(np.float64))
        assert again.read(name).dtype == x.dtype
        np.testing.assert_array_equal(again.read(name), x)


SETTINGS: list[dict[str, Any]] = [
    {"target_modules": ["q", "k_proj"]},
    {"target_modules": ["layers.0.q", "q"], "layers_to_transform": [1]},
    {"target_modules": ["q", "experts.1.up"], "layers_to_transform": 0},
    {"target_modules": ["q", "up"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    {"target_modules": ["q", "up"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q", "up"], "exclude_modules": ["0.q", "model.q"]},
    {"target_modules": ["q", "up"], "exclude_modules": r".*\.experts\..*"},
    {"target_modules": r"model\..*\.(q|up)"},
    {"target_modules": ["q", "up", "head"], "modules_to_save": ["head", "layers.1"]},
    {"target_modules": ["q", "up", "score"], "modules_to_save": ["core"]},
]
RANKS: list[dict[str, Any]] = [
    {},
    {"q": 3},
    {r"layers\.\d+\.q": 4, "q": 5},
    {"q": 5, r"layers\.\d+\.q": 4},
    {"^model.q": 6, "up|q": 7},
    {"model.layers.1": 8, r".*experts.*": 9},
]


def _modules() -> list[str]:
    inner = ("q", "k_proj", "xq", "experts.0.up", "experts.1.up", "experts.1.q")
    layers = [f"model.{at}.{k}.{x}" for at in ("layers", "h") for k in range(3) for x in inner]
    return [*layers, "q", "model.q", "layers.0.q", "head", "x.head", "head.out", "score"]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_targets_are_those_of_peft(settings: dict[str, Any]) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs = peft.LoraConfig(r=2, **settings)
    config = jl.peft.config.PeftConfig.from_json("here", theirs.to_dict() | settings)
    # What is excluded is an object of its own there, which is true.
    found = {name: check_target_module_exists(theirs, name) for name in _modules()}
    expected = [name for name, x in found.items() if x is True or isinstance(x, re.Match)]
    assert [name for name in _modules() if config.is_target(name)] == expected
    assert 0 < len(expected) < len(_modules())


@pytest.mark.parametrize("patterns", RANKS, ids=str)
def test_patterns_are_those_of_peft(patterns: dict[str, Any]) -> None:
    from peft.utils.other import get_pattern_key

    data = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": ["q"]}
    config = jl.peft.config.PeftConfig.from_json("here", data | {"rank_pattern": patterns})
    for name in _modules():
        assert config.rank_of(name) == patterns.get(get_pattern_key(patterns, name), 2), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
            "ensure_weight_tying: one adapter of a table and of a head",
        ),
        (
            {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
            "ensure_weight_tying: one adapter of a table and of a head",
        ),
        ({"lora_bias": True}, "lora_bias: is set to True, which is not implemented"),
        ({"target_parameters": ["lm_head.weight"]}, "target_parameters: is set to"),
        ({"target_modules": ["embed_tokens"]}, "it is used as embedding and linear"),
    ],
    ids=str,
)
# PEFT warns of tied tables, and of what it does not know of parameters.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_what_peft_can_and_is_not_implemented(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Refused by the name of the setting, or of the parameter: never loaded wrong."""
    model = MODELS["llama-tied"]
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | settings)
    peft.get_peft_model(model.torch(), config).save_pretrained(tmp_path)
    params, uses, _ = base("llama-tied")
    with pytest.raises(jl.CheckpointError) as caught:
        jl.peft.load(tmp_path, params, model.names, uses)
    assert message in str(caught.value)


def test_transformers_loads_merged_weights(tmp_path: Path) -> None:
    model = MODELS["llama-scanned"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], use_dora=True)
    wrapped = peft.get_peft_model(model.torch(), config)
    randomized(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    params, uses, _ = base("llama-scanned")
    adapter = jl.peft.load(tmp_path / "adapter", params, model.names, uses).adapter
    merged = jl.merge(params, adapter)
    jl.peft.save_weights(tmp_path / "model", merged, model.names, uses, shard_bytes=5000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    model.torch().config.save_pretrained(tmp_path / "model")
    found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model").eval()
    expected = logits(wrapped.eval(), model.inputs)
    assert distance(logits(found, model.inputs), expected) < CLOSE
    assert distance(logits(model.torch(), model.inputs), expected) > FAR
