"""The transformer in Flax linen, for `ours_linen` and `qwix_linen`."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from benchmarks.models import attention, cross_entropy
from benchmarks.peers import plain
from benchmarks.transformer import EPSILON, MATRICES, Task


class Block(nn.Module):
    """A pre-norm layer."""

    task: Task

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[batch, length, width]`` to the same."""
        task = self.task

        def dense(name: str) -> nn.Dense:
            return nn.Dense(
                MATRICES[name][1] * task.width, use_bias=False, name=name, dtype=task.dtype
            )

        def norm(name: str) -> nn.RMSNorm:
            return nn.RMSNorm(EPSILON, name=name, dtype=task.dtype)

        h = norm("norm1")(x)
        mixed = attention(dense("query")(h), dense("key")(h), dense("value")(h), task.head_width)
        x = x + dense("out")(mixed)
        return x + dense("down")(nn.gelu(dense("up")(norm("norm2")(x))))


class Transformer(nn.Module):
    """A language model; called, it gives the loss."""

    task: Task

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The loss of the next token, of ``[batch, length]``."""
        task = self.task
        x = nn.Embed(task.vocabulary, task.width, name="embedding", dtype=task.dtype)(tokens)
        if task.scanned:
            layers = nn.scan(
                lambda block, x, _: (block(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=task.depth,
            )
            x, _ = layers(Block(task, name="layers"), x, None)
        else:
            for layer in range(task.depth):
                x = Block(task, name=f"layers_{layer}")(x)
        x = nn.RMSNorm(EPSILON, name="norm", dtype=task.dtype)(x)
        logits = nn.Dense(task.vocabulary, use_bias=False, name="head", dtype=task.dtype)(x)
        return cross_entropy(logits[:, :-1], tokens[:, 1:])


def path_of(name: str, layer: int | None) -> str:
    """The path of a matrix in the variables."""
    return f"params/{'layers' if layer is None else f'layers_{layer}'}/{name}/kernel"


def variables_of(task: Task) -> dict[str, Any]:
    """The weights as linen's variables."""
    params = plain.params_of(task)

    def block(layer: Any) -> Any:
        return layer | {name: {"scale": layer[name]} for name in ("norm1", "norm2")}

    layers = params["layers"]
    if task.scanned:
        blocks = {"layers": block(layers)}
    else:
        blocks = {f"layers_{k}": block(layer) for k, layer in enumerate(layers)}
    return {
        "params": {
            "embedding": {"embedding": params["embedding"]},
            "norm": {"scale": params["norm"]},
            "head": params["head"],
            **blocks,
        }
    }
