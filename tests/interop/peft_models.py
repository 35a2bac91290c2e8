"""Tiny models of PyTorch's world and the same functions in plain JAX over their weights."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB, WIDTH, HEADS, KV, INNER, LAYERS = 19, 16, 4, 2, 24, 2
TOKENS = np.array([[1, 5, 2, 18, 7, 3], [4, 4, 11, 0, 9, 16]])
IMAGES = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
# Compiling takes longer than running here.
QUICK = {"xla_backend_optimization_level": 0}
#: The parameters by torch's own names: `{name**}` is everything.
SAME = (jl.peft.Name("{name**}", "{name}"),)


@dataclasses.dataclass(frozen=True)
class Model:
    """One model in both worlds.

    Attributes:
        torch: Makes the module, with the same random weights each time.
        forward: The same function in JAX, of parameters and inputs.
        params: The parameters of the JAX function from torch's ``state_dict``.
        names: What torch calls them.
        inputs: For both.
    """

    torch: Callable[[], Any]
    forward: Callable[[Any, Any], Any]
    inputs: np.ndarray
    params: Callable[[dict[str, np.ndarray]], Any] = lambda state: state
    names: tuple[jl.peft.Name, ...] = SAME


def _dense(p: Any, name: str, x: Any) -> Any:
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def _normed(p: Any, name: str, x: Any, epsilon: float) -> Any:
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + np.float32(epsilon))
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def _heads(x: Any, heads: int) -> Any:
    return x.reshape(*x.shape[:-1], heads, -1).transpose(0, 2, 1, 3)


def _attend(q: Any, k: Any, v: Any, *, causal: bool) -> Any:
    scores = q @ k.mT / np.float32(math.sqrt(q.shape[-1]))
    if causal:
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
    y = (jax.nn.softmax(scores, -1) @ v).transpose(0, 2, 1, 3)
    return y.reshape(*y.shape[:2], -1)


def _gelu(x: Any) -> Any:
    return jax.nn.gelu(x, approximate=False)


def _rms(weight: Any, x: Any) -> Any:
    return weight * (x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + np.float32(1e-6)))


def _turned(x: Any) -> Any:
    size = x.shape[-1]
    rates = 10000.0 ** (-np.arange(0, size, 2) / size)
    angles = np.outer(np.arange(x.shape[-2]), rates)
    cos, sin = (np.tile(f(angles), 2).astype(np.float32) for f in (np.cos, np.sin))
    first, second = jnp.split(x, 2, -1)
    return x * cos + jnp.concatenate([-second, first], -1) * sin


def _llama_block(dense: Callable[[str, Any], Any], scale: Callable[[str], Any], x: Any) -> Any:
    y = _rms(scale("input_layernorm"), x)
    q = _turned(_heads(dense("self_attn.q_proj", y), HEADS))
    k = _turned(_heads(dense("self_attn.k_proj", y), KV))
    v = _heads(dense("self_attn.v_proj", y), KV)
    k, v = (jnp.repeat(z, HEADS // KV, 1) for z in (k, v))
    x = x + dense("self_attn.o_proj", _attend(q, k, v, causal=True))
    y = _rms(scale("post_attention_layernorm"), x)
    up = jax.nn.silu(dense("mlp.gate_proj", y)) * dense("mlp.up_proj", y)
    return x + dense("mlp.down_proj", up)


def _qwen2(p: Any, tokens: Any) -> Any:
    x = p["model.embed_tokens.weight"][tokens]
    for k in range(LAYERS):
        start = f"model.layers.{k}."

        def dense(name: str, y: Any, start: str = start) -> Any:
            return _dense(p, start + name, y)

        x = _llama_block(dense, lambda name, s=start: p[f"{s}{name}.weight"], x)
    return _rms(p["model.norm.weight"], x) @ p["lm_head.weight"].T


_INSIDE = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_NORMS = {"before": "input_layernorm", "after": "post_attention_layernorm"}
_SHORT = {long: short for short, long in (_INSIDE | _NORMS).items()}


def _llama_layer(layer: Any, x: Any) -> Any:
    return _llama_block(
        lambda name, y: y @ layer[_SHORT[name]]["kernel"], lambda name: layer[_SHORT[name]], x
    )


def _llama(p: Any, tokens: Any) -> Any:
    x = p["embed"]["embedding"][tokens]
    for k in range(LAYERS):
        x = _llama_layer(p[f"layers_{k}"], x)
    return _rms(p["norm"], x) @ p["head"]["kernel"]


def _llama_scanned(p: Any, tokens: Any) -> Any:
    x = p["embed"]["embedding"][tokens]
    x, _ = jax.lax.scan(lambda x, layer: (_llama_layer(layer, x), None), x, p["layers"])
    return _rms(p["norm"], x) @ p["head"]["kernel"]


def _llama_params(state: dict[str, np.ndarray]) -> Any:
    """Kernels are ``[in, out]``, as Flax has them."""
    params = {
        "embed": {"embedding": state["model.embed_tokens.weight"]},
        "norm": state["model.norm.weight"],
        "head": {"kernel": state["lm_head.weight"].T},
    }
    for k in range(LAYERS):
        start = f"model.layers.{k}."
        layer = {s: {"kernel": state[f"{start}{n}.weight"].T} for s, n in _INSIDE.items()}
        layer |= {short: state[f"{start}{name}.weight"] for short, name in _NORMS.items()}
        params[f"layers_{k}"] = layer
    return params


def _stacked(state: dict[str, np.ndarray]) -> Any:
    params = _llama_params(state)
    layers = [params.pop(f"layers_{k}") for k in range(LAYERS)]
    return params | {"layers": jax.tree.map(lambda *xs: jnp.stack(xs), *layers)}


def _llama_names(layers: str) -> tuple[jl.peft.Name, ...]:
    inside = {f"{short}/kernel": name for short, name in _INSIDE.items()} | _NORMS
    return (
        jl.peft.Name("embed/embedding", "model.embed_tokens.weight"),
        jl.peft.Name("norm", "model.norm.weight"),
        jl.peft.Name("head/kernel", "lm_head.weight"),
        *(
            jl.peft.Name(f"{layers}/{path}", f"model.layers.{{layer}}.{name}.weight")
            for path, name in inside.items()
        ),
    )


def _llama_fused(p: Any, tokens: Any) -> Any:
    """Queries, keys and values side by side in one kernel; gate and up in a stack of two."""
    x = p["embed"]["embedding"][tokens]
    size = WIDTH // HEADS
    for k in range(LAYERS):
        layer = p["layers"][k]
        products = ("q", "k", "v"), (HEADS * size, (HEADS + KV) * size)

        def dense(name: str, y: Any, layer: Any = layer, products: Any = products) -> Any:
            short = _SHORT[name]
            if short in products[0]:
                parts = jnp.split(y @ layer["qkv"]["kernel"], products[1], -1)
                return parts[products[0].index(short)]
            if short in ("gate", "up"):
                return y @ layer["gating"][("gate", "up").index(short)]
            return y @ layer[short]["kernel"]

        x = _llama_block(dense, lambda name, layer=layer: layer[_SHORT[name]], x)
    return _rms(p["norm"], x) @ p["head"]["kernel"]


def _fused(state: dict[str, np.ndarray]) -> Any:
    params = _llama_params(state)
    layers = [params.pop(f"layers_{k}") for k in range(LAYERS)]
    for layer in layers:
        kernels = {short: layer.pop(short)["kernel"] for short in ("q", "k", "v", "gate", "up")}
        layer["qkv"] = {"kernel": np.concatenate([kernels[x] for x in "qkv"], 1)}
        layer["gating"] = np.stack([kernels["gate"], kernels["up"]])
    return params | {"layers": layers}


_SIZES = {"q": WIDTH, "k": WIDTH * KV // HEADS, "v": WIDTH * KV // HEADS}
_FUSED_NAMES = (
    jl.peft.Name(
        "layers/{k}/qkv/kernel",
        "model.layers.{k}.self_attn.{which}_proj.weight",
        parts={"which": _SIZES},
    ),
    jl.peft.Name(
        "layers/{k}/gating",
        "model.layers.{k}.mlp.{which}_proj.weight",
        parts={"which": ("gate", "up")},
    ),
)


def _llama_tied(p: Any, tokens: Any) -> Any:
    return _qwen2({**p, "lm_head.weight": p["model.embed_tokens.weight"]}, tokens)


def _gpt2(p: Any, tokens: Any) -> Any:
    def conv1d(name: str, x: Any) -> Any:
        return x @ p[f"{name}.weight"] + p[f"{name}.bias"]

    table = p["transformer.wte.weight"]
    x = table[tokens] + p["transformer.wpe.weight"][jnp.arange(tokens.shape[1])]
    for k in range(LAYERS):
        h = f"transformer.h.{k}."
        y = conv1d(f"{h}attn.c_attn", _normed(p, f"{h}ln_1", x, 1e-5))
        q, key, v = (_heads(z, HEADS) for z in jnp.split(y, 3, -1))
        x = x + conv1d(f"{h}attn.c_proj", _attend(q, key, v, causal=True))
        y = conv1d(f"{h}mlp.c_fc", _normed(p, f"{h}ln_2", x, 1e-5))
        x = x + conv1d(f"{h}mlp.c_proj", jax.nn.gelu(y, approximate=True))
    return _normed(p, "transformer.ln_f", x, 1e-5) @ table.T


def _untied(state: dict[str, np.ndarray]) -> Any:
    return {name: x for name, x in state.items() if name != "lm_head.weight"}


def _bert(p: Any, tokens: Any) -> Any:
    e = "bert.embeddings."
    x = p[f"{e}word_embeddings.weight"][tokens]
    x = x + p[f"{e}token_type_embeddings.weight"][jnp.zeros_like(tokens)]
    x = x + p[f"{e}position_embeddings.weight"][: tokens.shape[1]]
    x = _normed(p, f"{e}LayerNorm", x, 1e-12)
    for k in range(LAYERS):
        h = f"bert.encoder.layer.{k}."
        q, key, v = (
            _heads(_dense(p, f"{h}attention.self.{z}", x), HEADS) for z in ("query", "key", "value")
        )
        y = _dense(p, f"{h}attention.output.dense", _attend(q, key, v, causal=False))
        x = _normed(p, f"{h}attention.output.LayerNorm", x + y, 1e-12)
        y = _dense(p, f"{h}output.dense", _gelu(_dense(p, f"{h}intermediate.dense", x)))
        x = _normed(p, f"{h}output.LayerNorm", x + y, 1e-12)
    return _dense(p, "classifier", jnp.tanh(_dense(p, "bert.pooler.dense", x[:, 0])))


def _vit(p: Any, images: Any) -> Any:
    e = "vit.embeddings."
    x = jax.lax.conv_general_dilated(
        images, p[f"{e}patch_embeddings.projection.weight"], (4, 4), "VALID"
    )
    x = x + p[f"{e}patch_embeddings.projection.bias"][:, None, None]
    x = x.reshape(*x.shape[:2], -1).mT
    first = jnp.broadcast_to(p[f"{e}cls_token"], (x.shape[0], 1, x.shape[-1]))
    x = jnp.concatenate([first, x], 1) + p[f"{e}position_embeddings"]
    for k in range(LAYERS):
        h = f"vit.layers.{k}."
        y = _normed(p, f"{h}layernorm_before", x, 1e-12)
        q, key, v = (_heads(_dense(p, f"{h}attention.{z}_proj", y), HEADS) for z in "qkv")
        x = x + _dense(p, f"{h}attention.o_proj", _attend(q, key, v, causal=False))
        y = _normed(p, f"{h}layernorm_after", x, 1e-12)
        x = x + _dense(p, f"{h}mlp.fc2", _gelu(_dense(p, f"{h}mlp.fc1", y)))
    return _dense(p, "classifier", _normed(p, "vit.layernorm", x, 1e-12)[:, 0])


class TinyCNN(torch.nn.Module):
    """Two convolutions, one with a stride, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(6, 8, (3, 2), stride=2)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.conv1(x))
        x = torch.relu(self.conv2(x))
        return self.head(x.mean((2, 3)))


def _cnn(p: Any, images: Any) -> Any:
    """Images and kernels as Flax has them: ``[n, h, w, c]`` and ``[h, w, in, out]``."""
    x = images.transpose(0, 2, 3, 1)
    for name, stride, padding in (("conv1", 1, "SAME"), ("conv2", 2, "VALID")):
        x = jax.lax.conv_general_dilated(
            x,
            p[name]["kernel"],
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jax.nn.relu(x + p[name]["bias"])
    return x.mean((1, 2)) @ p["head"]["kernel"] + p["head"]["bias"]


def _cnn_params(state: dict[str, np.ndarray]) -> Any:
    params: dict[str, Any] = {}
    for name in ("conv1", "conv2", "head"):
        w = state[f"{name}.weight"]
        kernel = w.transpose(2, 3, 1, 0) if w.ndim == 4 else w.T
        params[name] = {"kernel": kernel, "bias": state[f"{name}.bias"]}
    return params


def _hf(config: str, model: str, **settings: Any) -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(0)
        filled = getattr(transformers, config)(initializer_range=0.2, **settings)
        return _random(getattr(transformers, model)(filled))

    return make


def _tiny_cnn() -> Any:
    torch.manual_seed(0)
    return _random(TinyCNN())


def _random(model: Any) -> Any:
    """Biases and norms off their defaults too: what is zero or one hides a mistake."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_ENCODER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
}
_MAKE_LLAMA = _hf("LlamaConfig", "LlamaForCausalLM", **_LLAMA)
_MAKE_TIED = _hf("LlamaConfig", "LlamaForCausalLM", tie_word_embeddings=True, **_LLAMA)

MODELS = {
    "llama": Model(_MAKE_LLAMA, _llama, TOKENS, _llama_params, _llama_names("layers_{layer}")),
    "llama-scanned": Model(_MAKE_LLAMA, _llama_scanned, TOKENS, _stacked, _llama_names("layers")),
    "llama-tied": Model(_MAKE_TIED, _llama_tied, TOKENS, _untied),
    # Torch has one parameter, we have two with its values.
    "llama-copied": Model(_MAKE_TIED, _qwen2, TOKENS),
    "llama-fused": Model(
        _MAKE_LLAMA, _llama_fused, TOKENS, _fused, (*_FUSED_NAMES, *_llama_names("layers/{layer}"))
    ),
    "qwen2": Model(_hf("Qwen2Config", "Qwen2ForCausalLM", **_LLAMA), _qwen2, TOKENS),
    "gpt2": Model(
        _hf(
            "GPT2Config",
            "GPT2LMHeadModel",
            vocab_size=VOCAB,
            n_positions=8,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            bos_token_id=0,
            eos_token_id=0,
        ),
        _gpt2,
        TOKENS,
        _untied,
        (
            jl.peft.Name(
                "transformer.h.{k}.attn.{m}.weight",
                "transformer.h.{k}.attn.{m}.weight",
                kind="conv1d",
            ),
            jl.peft.Name(
                "transformer.h.{k}.mlp.{m}.weight",
                "transformer.h.{k}.mlp.{m}.weight",
                kind="conv1d",
            ),
            *SAME,
        ),
    ),
    "bert": Model(
        _hf(
            "BertConfig",
            "BertForSequenceClassification",
            vocab_size=VOCAB,
            max_position_embeddings=8,
            **_ENCODER,
        ),
        _bert,
        TOKENS,
        names=(
            jl.peft.Name(
                "bert.embeddings.position_embeddings.weight",
                "bert.embeddings.position_embeddings.weight",
                kind="embedding",
            ),
            *SAME,
        ),
    ),
    "vit": Model(
        _hf("ViTConfig", "ViTForImageClassification", image_size=8, patch_size=4, **_ENCODER),
        _vit,
        IMAGES,
    ),
    "cnn": Model(
        _tiny_cnn,
        _cnn,
        IMAGES,
        _cnn_params,
        (
            jl.peft.Name("{module}/kernel", "{module}.weight"),
            jl.peft.Name("{module}/bias", "{module}.bias"),
        ),
    ),
}


def state(model: Any) -> dict[str, np.ndarray]:
    return {name: x.detach().numpy().copy() for name, x in model.state_dict().items()}


def logits(model: Any, inputs: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found = model(torch.from_numpy(inputs))
    return (found.logits if hasattr(found, "logits") else found).numpy()


@functools.cache
def base(which: str) -> tuple[Any, Any, Any]:
    """The JAX parameters, their uses, and the compiled function."""
    model = MODELS[which]
    params = jax.tree.map(jnp.asarray, model.params(state(model.torch())))
    uses = jl.discover(model.forward, params, jnp.asarray(model.inputs))
    plain = jax.jit(model.forward, compiler_options=QUICK)
    return params, uses, lambda params: np.asarray(plain(params, jnp.asarray(model.inputs)))


@functools.cache
def _adapted(forward: Callable[[Any, Any], Any]) -> Any:
    """One function for all adapters: those of the same shapes share a compiled program."""
    return jax.jit(jl.apply(forward), compiler_options=QUICK)


def ours(model: Model, params: Any, adapter: jl.Adapter) -> np.ndarray:
    return np.asarray(_adapted(model.forward)(params, adapter, jnp.asarray(model.inputs)))


def distance(left: np.ndarray, right: np.ndarray) -> float:
    assert left.shape == right.shape
    return float(np.abs(left - right).max())


def randomized(wrapped: Any) -> None:
    """Every trained number off its start, so that each of them matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
            elif "hada_" in name or "lokr_" in name:
                parameter.copy_(0.5 * torch.randn_like(parameter))
            elif parameter.requires_grad:
                parameter *= 1 + 0.2 * torch.rand_like(parameter)
