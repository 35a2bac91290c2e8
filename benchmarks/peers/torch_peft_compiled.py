"""Hugging Face PEFT on PyTorch, through `torch.compile`."""

from __future__ import annotations

from benchmarks.peers.torch_model import TorchSubject
from benchmarks.peers.torch_peft import adapted, pair_of
from benchmarks.transformer import Task


def subject(task: Task) -> TorchSubject:
    """The step."""
    return TorchSubject(task, adapted(task), pair_of, compiled=True)
