"""Hugging Face PEFT on PyTorch, eager."""

from __future__ import annotations

from typing import Any

import peft

from benchmarks.peers.torch_model import TorchSubject, Transformer, fill
from benchmarks.transformer import MATRICES, Task


def adapted(task: Task) -> Transformer:
    """The model with PEFT's layers in it."""
    config = peft.LoraConfig(r=task.rank, lora_alpha=task.rank, target_modules=list(MATRICES))
    return peft.inject_adapter_in_model(config, fill(task, Transformer(task)))


def pair_of(layer: Any) -> Any:
    """The factors of one of PEFT's layers."""
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def subject(task: Task) -> TorchSubject:
    """The step."""
    return TorchSubject(task, adapted(task), pair_of)
