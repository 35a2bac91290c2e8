"""qwix's LoRA on the NNX module."""

from __future__ import annotations

import qwix
from flax import nnx

from benchmarks.compiled import JaxSubject
from benchmarks.peers import plain
from benchmarks.peers.nnx_lora import program
from benchmarks.peers.nnx_model import blocks_of, model_of
from benchmarks.peers.qwix_linen import provider_of
from benchmarks.transformer import Task


def subject(task: Task) -> JaxSubject:
    """The step."""
    # Its own initialisation runs the model, which fails in a scan; the factors are ours anyway.
    model = qwix.apply_lora_to_model(
        model_of(task),
        provider_of(task),
        *plain.batch_of(task),
        rngs=nnx.Rngs(0),
        skip_nnx_init=True,
    )
    for block, layer in zip(blocks_of(task, model), plain.layers_of(task), strict=True):
        for name, (a, b) in layer.items():
            linear = getattr(block, name)
            linear.kernel_lora_a, linear.kernel_lora_b = nnx.LoRAParam(a), nnx.LoRAParam(b)
    return JaxSubject(program(task, model, "kernel_lora_a", "kernel_lora_b"), task.optimize)
