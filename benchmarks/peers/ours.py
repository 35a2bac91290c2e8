"""jax_lora on the plain function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_lora as jl
from benchmarks.compiled import JaxSubject, Program
from benchmarks.peers import plain
from benchmarks.transformer import MATRICES, Task, factors


def adapt(
    task: Task, fun: Callable[..., Any], params: Any, path_of: Callable[[str, int | None], str]
) -> JaxSubject:
    """The step of any function of parameters.

    Args:
        task: The task.
        fun: ``fun(params, tokens) -> loss``; its code is not touched.
        params: Its parameters.
        path_of: From a matrix's name and its layer, None for all, to the parameter's path.
    """
    layers = [None] if task.scanned else list(range(task.depth))
    paths = {path_of(name, layer): (name, layer) for name in MATRICES for layer in layers}
    config = jl.LoraConfig(rank=task.rank, alpha=task.rank, targets=tuple(paths))
    batch = plain.batch_of(task)
    plan = jl.plan(fun, params, *batch, config=config)
    fresh = jl.init(jax.random.key(0), params, plan)
    arrays = factors(task)

    def started(path: str) -> Any:
        name, layer = paths[path]
        a, b = arrays[f"{name} a"], arrays[f"{name} b"]
        if layer is not None:
            a, b = a[layer], b[layer]
        entry: Any = fresh[path]
        return dataclasses.replace(entry, a=jnp.asarray(a), b=jnp.asarray(b))

    def arrays_of(adapter: Any) -> Mapping[str, np.ndarray]:
        found = {}
        for name in MATRICES:
            entries = [adapter[path_of(name, layer)] for layer in layers]
            for ab in "ab":
                values = [getattr(entry, ab) for entry in entries]
                found[f"{name} {ab}"] = values[0] if task.scanned else np.stack(values)
        return found

    def make_loss() -> Any:
        # A new function for each: what one run caches by the function, no other finds.
        adapted = jl.apply(lambda params, *batch: fun(params, *batch))
        return lambda adapter, params, *batch: adapted(params, adapter, *batch)

    program = Program(
        make_loss,
        jl.Adapter({path: started(path) for path in paths}),
        params,
        batch,
        arrays_of,
        jl.optim.lora_optimizer(plain.adam(task)),
    )
    return JaxSubject(program, task.optimize)


def subject(task: Task) -> JaxSubject:
    """The step on the plain function."""

    def path_of(name: str, layer: int | None) -> str:
        return f"layers/{name}/kernel" if layer is None else f"layers/{layer}/{name}/kernel"

    return adapt(task, plain.loss_of(task), plain.params_of(task), path_of)
