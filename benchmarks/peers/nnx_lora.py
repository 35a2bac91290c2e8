"""`flax.nnx.LoRA` around each linear layer, its parameters split off by their type."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.compiled import JaxSubject, Program
from benchmarks.peers import plain
from benchmarks.peers.nnx_model import Transformer, blocks_of, model_of, plain_linear
from benchmarks.transformer import Task


def lora_linear(task: Task, inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.LoRA:
    """A linear layer with its factors around it."""
    base = plain_linear(task, inputs, outputs, rngs)
    return nnx.LoRA(inputs, task.rank, outputs, base_module=base, dtype=task.dtype, rngs=rngs)


def subject(task: Task) -> JaxSubject:
    """The step."""
    model = model_of(task, lora_linear, lambda layer: layer.base_module)
    for block, layer in zip(blocks_of(task, model), plain.layers_of(task), strict=True):
        for name, (a, b) in layer.items():
            lora = getattr(block, name)
            lora.lora_a[...], lora.lora_b[...] = a, b
    return JaxSubject(program(task, model, "lora_a", "lora_b"), task.optimize)


def program(task: Task, model: Transformer, a: str, b: str) -> Program:
    """The program of a module whose factors have these names beside each matrix."""
    graph, trained, frozen = nnx.split(model, nnx.LoRAParam, ...)

    def arrays_of(state: Any) -> dict[str, np.ndarray]:
        def layer(layer: Any) -> Any:
            return {n: (layer[n][a][...], layer[n][b][...]) for n in task.shapes()}

        layers = state["layers"]
        if task.scanned:
            return plain.arrays_of(jax.tree.map(np.asarray, layer(layers)))
        return plain.arrays_of([layer(layers[k]) for k in range(task.depth)])

    def make_loss() -> Any:
        def loss(trained: Any, frozen: Any, tokens: Any) -> Any:
            # New variables: NNX refuses those that come from outside of the differentiation.
            frozen = jax.tree.map(lambda x: x, frozen)
            return nnx.merge(graph, trained, frozen)(tokens)

        return loss

    return Program(make_loss, trained, frozen, plain.batch_of(task), arrays_of, plain.adam(task))
