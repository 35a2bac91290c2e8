"""The transformer in Flax NNX, for `ours_nnx`, `qwix_nnx` and `nnx_lora`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from benchmarks.models import attention, cross_entropy
from benchmarks.peers import plain
from benchmarks.transformer import EPSILON, Task

#: ``make(task, inputs, outputs, rngs)``: a linear layer without bias.
Linear = Callable[[Task, int, int, nnx.Rngs], Any]


def plain_linear(task: Task, inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    """What is adapted afterwards, or not at all."""
    return nnx.Linear(inputs, outputs, use_bias=False, dtype=task.dtype, rngs=rngs)


class Block(nnx.Module):
    """A pre-norm layer."""

    def __init__(self, task: Task, linear: Linear, rngs: nnx.Rngs):
        self.head_width = task.head_width
        for name, shape in task.shapes().items():
            setattr(self, name, linear(task, *shape, rngs))
        self.norm1, self.norm2 = (
            nnx.RMSNorm(task.width, epsilon=EPSILON, dtype=task.dtype, rngs=rngs) for _ in range(2)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[batch, length, width]`` to the same."""
        h = self.norm1(x)
        x = x + self.out(attention(self.query(h), self.key(h), self.value(h), self.head_width))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """A language model; called, it gives the loss."""

    def __init__(self, task: Task, linear: Linear, rngs: nnx.Rngs):
        width = task.width
        self.embedding = nnx.Embed(task.vocabulary, width, dtype=task.dtype, rngs=rngs)
        self.norm = nnx.RMSNorm(width, epsilon=EPSILON, dtype=task.dtype, rngs=rngs)
        self.head = plain_linear(task, width, task.vocabulary, rngs)
        self.scanned = task.scanned
        if task.scanned:
            make = nnx.vmap(lambda rngs: Block(task, linear, rngs), in_axes=0, out_axes=0)
            self.layers = nnx.split_rngs(splits=task.depth)(make)(rngs)
        else:
            self.layers = nnx.List([Block(task, linear, rngs) for _ in range(task.depth)])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The loss of the next token, of ``[batch, length]``."""
        x = self.embedding(tokens)
        if self.scanned:
            forward = nnx.scan(
                lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
            )
            x = forward(x, self.layers)
        else:
            for layer in self.layers:
                x = layer(x)
        return cross_entropy(self.head(self.norm(x))[:, :-1], tokens[:, 1:])


def blocks_of(task: Task, model: Transformer) -> list[Block]:
    """The layers; one that stands for all where they are stacked."""
    return [model.layers] if task.scanned else list(model.layers)


def model_of(
    task: Task, linear: Linear = plain_linear, base_of: Callable[[Any], Any] = lambda layer: layer
) -> Transformer:
    """The model with the task's weights.

    Args:
        task: The task.
        linear: What makes the linear layers.
        base_of: From one of them to the module that holds its weight.
    """
    model = Transformer(task, linear, nnx.Rngs(0))
    params = plain.params_of(task)

    def fill(block: Block, layer: Any) -> None:
        for name in task.shapes():
            base_of(getattr(block, name)).kernel[...] = layer[name]["kernel"]
        for name in ("norm1", "norm2"):
            getattr(block, name).scale[...] = layer[name]

    model.embedding.embedding[...] = params["embedding"]
    model.norm.scale[...] = params["norm"]
    model.head.kernel[...] = params["head"]["kernel"]
    layers = [params["layers"]] if task.scanned else params["layers"]
    for block, layer in zip(blocks_of(task, model), layers, strict=True):
        fill(block, layer)
    return model
