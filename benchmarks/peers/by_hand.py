"""LoRA written into the model, ``x W + (x a) b`` for each product: the engine's bound."""

from __future__ import annotations

from typing import Any

from benchmarks.compiled import JaxSubject, Program
from benchmarks.models import Factored
from benchmarks.peers import plain
from benchmarks.transformer import Task


def subject(task: Task) -> JaxSubject:
    """The step."""
    loss_fun = plain.loss_of(task)

    def make_loss() -> Any:
        return lambda pairs, params, tokens: loss_fun(
            plain.with_weights(params, pairs, Factored), tokens
        )

    program = Program(
        make_loss,
        plain.factors_of(task),
        plain.params_of(task),
        plain.batch_of(task),
        plain.arrays_of,
        plain.adam(task),
    )
    return JaxSubject(program, task.optimize)
