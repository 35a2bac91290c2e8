"""jax_lora on the linen module."""

from __future__ import annotations

from benchmarks.compiled import JaxSubject
from benchmarks.peers.linen_model import Transformer, path_of, variables_of
from benchmarks.peers.ours import adapt
from benchmarks.transformer import Task


def subject(task: Task) -> JaxSubject:
    """The step."""
    return adapt(task, Transformer(task).apply, variables_of(task), path_of)
