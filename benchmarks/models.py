"""Plain JAX models, and the same with LoRA written into them by hand.

Each model is one function of parameters. Where a parameter is a `Factored`, its products are
``x W + scale (x a) b``: that is LoRA as one would write it without a library.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored:
    """A weight of the programs by hand; a pytree, so it is scanned like a plain weight."""

    w: jax.Array
    a: jax.Array
    b: jax.Array
    scale: float = dataclasses.field(metadata={"static": True}, default=1.0)


def dense(x: jax.Array, weight: Any) -> jax.Array:
    """A matrix product."""
    if isinstance(weight, Factored):
        a, b = weight.a.astype(x.dtype), weight.b.astype(x.dtype)
        return x @ weight.w + weight.scale * ((x @ a) @ b)
    return x @ weight


def experts(x: jax.Array, weight: Any) -> jax.Array:
    """A matrix product for each expert: ``x: [experts, tokens, in]``."""
    product = "eti,eio->eto"
    if isinstance(weight, Factored):
        update = jnp.einsum(product, jnp.einsum(product, x, weight.a), weight.b)
        return jnp.einsum(product, x, weight.w) + weight.scale * update
    return jnp.einsum(product, x, weight)


def conv(x: jax.Array, weight: Any, stride: int) -> jax.Array:
    """A convolution of images ``[batch, height, width, channels]``."""

    def convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=numbers
        )

    if isinstance(weight, Factored):
        update = convolve(convolve(x, weight.a, stride), weight.b[None, None], 1)
        return convolve(x, weight.w, stride) + weight.scale * update
    return convolve(x, weight, stride)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean of ``-log p[label]``."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
    return -chosen.mean()


def mlp(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss of a multilayer perceptron."""
    *hidden, last = params["layers"]
    for layer in hidden:
        x = jax.nn.relu(dense(x, layer["kernel"]) + layer["bias"])
    return cross_entropy(dense(x, last["kernel"]) + last["bias"], labels)


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """RMS normalisation."""
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def attention(q: jax.Array, k: jax.Array, v: jax.Array, head_width: int) -> jax.Array:
    """Causal attention of ``[batch, length, width]``, in heads of some width."""
    batch, length, width = q.shape
    q, k, v = (x.reshape(batch, length, width // head_width, head_width) for x in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(head_width)
    causal = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, width)


def block(params: Any, x: jax.Array) -> jax.Array:
    """A pre-norm transformer layer on ``[batch, length, width]``, with heads of width 64."""
    h = norm(x, params["norm1"])
    q, k, v = (dense(h, params[name]["kernel"]) for name in ("query", "key", "value"))
    mixed = attention(q, k, v, min(64, x.shape[-1]))
    x = x + dense(mixed, params["out"]["kernel"])
    h = norm(x, params["norm2"])
    return x + dense(jax.nn.gelu(dense(h, params["up"]["kernel"])), params["down"]["kernel"])


def language_loss(params: Any, x: jax.Array, tokens: jax.Array) -> jax.Array:
    """The loss of the next token, from the last layer's output."""
    logits = dense(norm(x, params["norm"]), params["head"]["kernel"])
    return cross_entropy(logits[:, :-1], tokens[:, 1:])


def unrolled_transformer(params: Any, tokens: jax.Array) -> jax.Array:
    """The loss of a language model whose layers are a Python loop."""
    x = params["embedding"][tokens]
    for layer in params["layers"]:
        x = block(layer, x)
    return language_loss(params, x, tokens)


def scanned_transformer(params: Any, tokens: jax.Array) -> jax.Array:
    """The same with stacked layers, scanned."""
    x, _ = lax.scan(
        lambda x, layer: (block(layer, x), None), params["embedding"][tokens], params["layers"]
    )
    return language_loss(params, x, tokens)


def remat_transformer(params: Any, tokens: jax.Array) -> jax.Array:
    """The same, each layer's activations computed again for the gradient."""
    layer_fun = jax.checkpoint(block)
    x, _ = lax.scan(
        lambda x, layer: (layer_fun(layer, x), None), params["embedding"][tokens], params["layers"]
    )
    return language_loss(params, x, tokens)


def cnn(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss of a convolutional network."""
    x = images
    for i, layer in enumerate(params["convs"]):
        x = jax.nn.relu(conv(x, layer["kernel"], 1 if i == 0 else 2) + layer["bias"])
    return cross_entropy(dense(x.mean((1, 2)), params["head"]["kernel"]), labels)


def mixture(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss of layers of experts; each token goes to one, as far as the expert has room."""
    for layer in params["layers"]:
        gates = jax.nn.softmax(x @ layer["router"])
        count = gates.shape[-1]
        room = 2 * x.shape[0] // count
        chosen = jax.nn.one_hot(gates.argmax(-1), count, dtype=x.dtype)
        place = (jnp.cumsum(chosen, axis=0) - 1) * chosen
        places = jax.nn.one_hot(place.sum(-1).astype(jnp.int32), room, dtype=x.dtype)
        dispatch = jnp.einsum("te,tp->tep", chosen, places)
        combine = dispatch * gates[..., None]
        h = jnp.einsum("tep,ti->epi", dispatch, x)
        h = jax.nn.relu(experts(h, layer["up"]["kernel"]))
        x = x + jnp.einsum("tep,epo->to", combine, experts(h, layer["down"]["kernel"]))
    return cross_entropy(dense(x, params["head"]["kernel"]), labels)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with random parameters and data.

    Attributes:
        what: What it is, in words.
        loss: ``loss(params, *batch)``; a parameter may be a `Factored`.
        params: The parameters.
        batch: The other arguments.
        rank: The rank of every adapted weight: each one that is called ``kernel``.
    """

    what: str
    loss: Callable[..., jax.Array]
    params: Any
    batch: tuple[Any, ...]
    rank: int


class Draw:
    """Reproducible random arrays."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def kernel(self, *shape: int, fan_in: int | None = None) -> dict[str, jax.Array]:
        """A weight with standard deviation ``1/sqrt(fan_in)``; its last two axes are in, out."""
        deviation = 1 / math.sqrt(shape[-2] if fan_in is None else fan_in)
        return {"kernel": self.normal(*shape, deviation=deviation)}

    def normal(self, *shape: int, deviation: float = 1.0) -> jax.Array:
        """Normal float32 numbers."""
        return jnp.asarray(deviation * self._rng.normal(size=shape), jnp.float32)

    def integers(self, high: int, *shape: int) -> jax.Array:
        """Integers from 0 to below ``high``."""
        return jnp.asarray(self._rng.integers(high, size=shape), jnp.int32)


def make_mlp(quick: bool) -> Model:
    """The multilayer perceptron."""
    draw = Draw()
    batch, sizes = (4, (6, 8, 8, 5)) if quick else (256, (1024, 2048, 2048, 1024))
    layers = [draw.kernel(i, o) | {"bias": jnp.zeros(o)} for i, o in pairwise(sizes)]
    x, labels = draw.normal(batch, sizes[0]), draw.integers(sizes[-1], batch)
    what = f"MLP {'-'.join(map(str, sizes))}, batch {batch}"
    return Model(what, mlp, {"layers": layers}, (x, labels), 2 if quick else 16)


def make_transformer(loss: Callable[..., jax.Array], how: str, quick: bool) -> Model:
    """A transformer, with stacked layers unless they are unrolled."""
    draw = Draw()
    depth, width, length, batch, vocabulary = (2, 8, 6, 2, 11) if quick else (4, 512, 128, 8, 1024)
    shapes = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    shapes |= {"up": (width, 4 * width), "down": (4 * width, width)}

    def layer() -> Any:
        norms = {name: jnp.ones(width) for name in ("norm1", "norm2")}
        return norms | {name: draw.kernel(*shape) for name, shape in shapes.items()}

    layers: Any = [layer() for _ in range(depth)]
    if loss is not unrolled_transformer:
        layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    params = {
        "embedding": draw.normal(vocabulary, width),
        "head": draw.kernel(width, vocabulary),
        "norm": jnp.ones(width),
        "layers": layers,
    }
    what = f"transformer, {depth} layers {how}, width {width}, {batch} x {length} tokens"
    tokens = draw.integers(vocabulary, batch, length)
    return Model(what, loss, params, (tokens,), 2 if quick else 16)


def make_cnn(quick: bool) -> Model:
    """The convolutional network."""
    draw = Draw()
    batch, size, channels = (2, 8, (3, 4, 5)) if quick else (32, 32, (3, 64, 128, 256))
    convs = [
        draw.kernel(3, 3, i, o, fan_in=9 * i) | {"bias": jnp.zeros(o)}
        for i, o in pairwise(channels)
    ]
    params = {"convs": convs, "head": draw.kernel(channels[-1], 100)}
    images, labels = draw.normal(batch, size, size, channels[0]), draw.integers(100, batch)
    what = f"CNN, 3x3 {'-'.join(map(str, channels))}, {batch} images {size}x{size}"
    return Model(what, cnn, params, (images, labels), 2 if quick else 16)


def make_mixture(quick: bool) -> Model:
    """The mixture of experts."""
    draw = Draw()
    depth, count, width, tokens = (1, 2, 6, 8) if quick else (2, 8, 512, 512)
    layers = [
        {
            "router": draw.normal(width, count, deviation=1 / math.sqrt(width)),
            "up": draw.kernel(count, width, 2 * width),
            "down": draw.kernel(count, 2 * width, width),
        }
        for _ in range(depth)
    ]
    params = {"layers": layers, "head": draw.kernel(width, 100)}
    what = f"mixture, {depth} layers of {count} experts, width {width}, {tokens} tokens"
    batch = (draw.normal(tokens, width), draw.integers(100, tokens))
    return Model(what, mixture, params, batch, 2 if quick else 16)


MODELS: dict[str, Callable[[bool], Model]] = {
    "mlp": make_mlp,
    "transformer": lambda quick: make_transformer(unrolled_transformer, "unrolled", quick),
    "scan": lambda quick: make_transformer(scanned_transformer, "scanned", quick),
    "remat": lambda quick: make_transformer(remat_transformer, "scanned and rematerialised", quick),
    "cnn": make_cnn,
    "mixture": make_mixture,
}
