"""LoRA on the weights: ``W + a b`` is formed in the loss, around a model that knows nothing."""

from __future__ import annotations

from typing import Any

import jax

from benchmarks.compiled import JaxSubject, Program
from benchmarks.peers import plain
from benchmarks.transformer import Task


def updated(w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """The weight with its update."""
    return w + (a @ b).astype(w.dtype)


def subject(task: Task) -> JaxSubject:
    """The step."""
    loss_fun = plain.loss_of(task)

    def make_loss() -> Any:
        return lambda pairs, params, tokens: loss_fun(
            plain.with_weights(params, pairs, updated), tokens
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
