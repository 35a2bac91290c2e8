"""Several tasks on one base: what it costs to switch adapters, and whether that is exact."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_lora as jl
from jax_lora.experiments.explore.study import KERNELS, Study, Task, run_of
from jax_lora.sweep import Trial

VEHICLES = ("airplane", "automobile", "ship", "truck")
_TURNS = 30


def tasks(study: Study) -> tuple[Task, ...]:
    """The base's own task and three others made of its images."""
    own = study.own_task
    names = study.dataset.label_names
    if set(VEHICLES) <= set(names):
        halves = Task(
            "animals or vehicles", own.transform, tuple(int(n in VEHICLES) for n in names)
        )
    else:
        halves = Task("even or odd", own.transform, tuple(k % 2 for k in range(len(names))))
    return (
        own,
        halves,
        Task("turned by 90°", lambda images: np.rot90(images, axes=(1, 2)), own.groups),
        # Red is shown as green, green as blue, blue as red.
        Task("colours exchanged", lambda images: np.roll(images, 1, axis=-1), own.groups),
    )


def measure(study: Study) -> dict[str, Any]:
    """Adapters of all tasks, each on all tasks; and switching between two of them."""
    options, all_tasks = study.options, tasks(study)
    lora: dict[str, Any] = {"rank": options.rank, "alpha": options.alpha, "targets": KERNELS}
    trials = [Trial(seed=seed, **lora) for seed in options.seeds]
    trained = {task.name: study.train(trials, task) for task in all_tasks}
    matrix: dict[str, dict[str, list[float]]] = {name: {} for name in ("base", *trained)}
    for task in all_tasks:
        test = study.tester(task)
        matrix["base"][task.name] = [test(jl.Adapter({}), study.params)]
        for name, results in trained.items():
            matrix[name][task.name] = [test(o.adapter, study.params) for o in results]
    first, second = (trained[task.name][0].adapter for task in all_tasks[:2])
    return {
        "tasks": [task.name for task in all_tasks],
        "accuracy": matrix,
        "runs": {name: [run_of(o) for o in results] for name, results in trained.items()},
        "bytes": {
            "model": sum(leaf.nbytes for leaf in jax.tree.leaves(study.params)),
            "adapter": first.nbytes,
        },
        "milliseconds": _milliseconds(study, first, second),
        "drift": _drift(study, first, second),
    }


def _switch(merged: Any, old: jl.Adapter, new: jl.Adapter) -> Any:
    """The article's switch: subtract ``B A``, add ``B' A'``."""
    return jl.merge(jl.unmerge(merged, old), new)


def _milliseconds(study: Study, first: jl.Adapter, second: jl.Adapter) -> dict[str, float]:
    """The median time of each way to switch, in turns; and of a batch with and without."""
    jit = _jit(study)
    merge, switch = jit(jl.merge), jit(_switch)
    plain, beside = jit(study.model.apply), jit(jl.apply(study.model.apply))
    params, merged = study.params, merge(study.params, first)
    images = jnp.ones(study.example.shape, study.example.dtype)
    with tempfile.TemporaryDirectory() as folder:
        jl.io.save_params(Path(folder) / "model", merged)
        jl.io.save_adapter(Path(folder) / "adapter", second)
        return _medians(
            {
                "subtract B A, add B' A'": lambda: switch(merged, first, second),
                "merge into the kept base": lambda: merge(params, second),
                "read the adapter's file": lambda: jl.io.load_adapter(Path(folder) / "adapter"),
                "read a whole model's file": lambda: jl.io.load_params(Path(folder) / "model"),
                "a batch, merged": lambda: plain(merged, images),
                "a batch, adapter beside": lambda: beside(params, first, images),
                "a batch, another adapter beside": lambda: beside(params, second, images),
            }
        )


def _medians(actions: dict[str, Callable[[], Any]]) -> dict[str, float]:
    for action in actions.values():
        action()  # compiles
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(_TURNS):
        for name, action in actions.items():
            start = time.perf_counter()
            jax.block_until_ready([x for x in jax.tree.leaves(action()) if hasattr(x, "shape")])
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def _drift(
    study: Study, first: jl.Adapter, second: jl.Adapter, counts: Sequence[int] = (1, 10, 100, 1000)
) -> list[dict[str, Any]]:
    """How far the base is from itself after switching to and fro and taking the last one out.

    In float32 and bfloat16: the largest change of a weight over the largest weight, the share of
    weights that changed, and for float32 the accuracy of the base that is left.
    """
    jit = _jit(study)
    switch, merge, unmerge = jit(_switch), jit(jl.merge), jit(jl.unmerge)
    test, rows = study.tester(study.own_task), []
    for dtype in ("float32", "bfloat16"):
        params = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), study.params)
        merged, done, pair = merge(params, first), 0, (first, second)
        for count in counts:
            for _ in range(count - done):
                merged, pair = switch(merged, *pair), pair[::-1]
            done = count
            left = unmerge(merged, pair[0])
            apart, share = _apart(left, params)
            wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), left)
            row = {"dtype": dtype, "switches": count, "largest": apart, "changed": share}
            rows.append({**row, "accuracy": test(jl.Adapter({}), wide)})
    return rows


def _apart(found: Any, expected: Any) -> tuple[float, float]:
    """The largest difference over the largest element, and the share of elements that differ."""
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        if a.ndim == 2
    ]
    largest = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
    changed = sum(int((a != b).sum()) for a, b in pairs) / sum(a.size for a, _ in pairs)
    return largest, changed


def _jit(study: Study) -> Callable[..., Any]:
    return lambda fun: jax.jit(fun, compiler_options=dict(study.compiler_options))
