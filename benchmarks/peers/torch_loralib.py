"""loralib on PyTorch, eager."""

from __future__ import annotations

from typing import Any

import loralib

from benchmarks.peers.torch_model import TorchSubject, Transformer, fill
from benchmarks.transformer import Task


def subject(task: Task) -> TorchSubject:
    """The step."""

    def linear(inputs: int, outputs: int) -> Any:
        return loralib.Linear(inputs, outputs, r=task.rank, lora_alpha=task.rank, bias=False)

    model = fill(task, Transformer(task, linear))
    return TorchSubject(task, model, lambda layer: (layer.lora_A, layer.lora_B))
