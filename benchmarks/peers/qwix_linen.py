"""qwix's LoRA on the linen module: matrix products are intercepted where the module is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import qwix

from benchmarks.compiled import JaxSubject, Program
from benchmarks.peers import plain
from benchmarks.peers.linen_model import Transformer, variables_of
from benchmarks.transformer import MATRICES, Task, factors, unstacked


def provider_of(task: Task) -> Any:
    """The matrices of the layers, at strength 1."""
    names = "|".join(MATRICES)
    return qwix.LoraProvider(module_path=f".*({names})", rank=task.rank, alpha=float(task.rank))


def subject(task: Task) -> JaxSubject:
    """The step."""
    variables = variables_of(task)
    arrays = factors(task)

    def beside(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {
            n: {f"kernel_lora_{ab}": jnp.asarray(arrays[f"{n} {ab}"]) for ab in "ab"}
            for n in MATRICES
        }

    if task.scanned:
        trained = {"layers": beside(arrays)}
    else:
        trained = {f"layers_{k}": beside(unstacked(arrays, k)) for k in range(task.depth)}

    def arrays_of(tree: Any) -> dict[str, np.ndarray]:
        def layer(layer: Any) -> Any:
            return {n: tuple(layer[n][f"kernel_lora_{ab}"] for ab in "ab") for n in MATRICES}

        if task.scanned:
            return plain.arrays_of(layer(tree["layers"]))
        return plain.arrays_of([layer(tree[f"layers_{k}"]) for k in range(task.depth)])

    def make_loss() -> Any:
        model = qwix.apply_lora_to_model(Transformer(task), provider_of(task))

        def loss(trained: Any, frozen: Any, tokens: Any) -> Any:
            params = dict(frozen["params"])
            for block, added in trained.items():
                params[block] = params[block] | {n: params[block][n] | added[n] for n in added}
            return model.apply({"params": params}, tokens)

        return loss

    program = Program(
        make_loss, trained, variables, plain.batch_of(task), arrays_of, plain.adam(task)
    )
    return JaxSubject(program, task.optimize)
