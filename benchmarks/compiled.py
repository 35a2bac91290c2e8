"""A training step in JAX, built from nothing, run and counted: the subject of every JAX program."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import machine
from benchmarks.harness import Sample, Values, changes

STAGES = ("trace_s", "lower_s", "compile_s")
#: Quicker to compile, where only the results matter.
UNOPTIMIZED = {"xla_backend_optimization_level": 0}


@dataclass(frozen=True)
class Program:
    """Something to train in JAX.

    Attributes:
        make_loss: A *new* function ``loss(trained, frozen, *batch) -> scalar`` at every call, so
            that what JAX caches by the function is not found again.
        trained: What is differentiated.
        frozen: What is not.
        batch: The rest of the arguments.
        arrays: From a tree like ``trained`` to its arrays by names that all programs share.
        optimizer: How it is trained; None for the gradient alone.
    """

    make_loss: Callable[[], Callable[..., jax.Array]]
    trained: Any
    frozen: Any
    batch: tuple[Any, ...]
    arrays: Callable[[Any], Values]
    optimizer: optax.GradientTransformation | None = None


class JaxSubject:
    """Builds, checks and runs the step of a `Program`.

    With an optimizer the step is ``(trained, state, frozen, *batch) -> (trained, state, loss)``,
    and its first two arguments are donated; without, ``-> (gradient, state, loss)``.

    Args:
        program: The program.
        optimize: Whether XLA optimises; if not, only the results matter.
    """

    def __init__(self, program: Program, optimize: bool = True) -> None:
        # A program from a persistent cache would not be compiled.
        jax.config.update("jax_enable_compilation_cache", False)
        self._program, self._optimizer, self._optimize = program, program.optimizer, optimize
        self._counts: dict[str, float] = {}
        self._compiled: Any = None
        self._reset()

    def _reset(self) -> None:
        # Copies: a step takes its first arguments' memory.
        self._trained = jax.tree.map(lambda x: x.copy(), self._program.trained)
        self._state = None if self._optimizer is None else self._optimizer.init(self._trained)

    def step_function(self) -> Callable[..., Any]:
        """What is compiled: a new function at every call."""
        loss_and_grad = jax.value_and_grad(self._program.make_loss())

        def gradient(trained: Any, state: Any, frozen: Any, *batch: Any) -> Any:
            loss, grads = loss_and_grad(trained, frozen, *batch)
            return grads, state, loss

        if (optimizer := self._optimizer) is None:
            return gradient

        def step(trained: Any, state: Any, frozen: Any, *batch: Any) -> Any:
            grads, state, loss = gradient(trained, state, frozen, *batch)
            updates, state = optimizer.update(grads, state, trained)
            return optax.apply_updates(trained, updates), state, loss

        return step

    def build(self) -> Sample:
        """Trace, lower and compile the step, from nothing unless only the results matter.

        Returns:
            The seconds of each stage and of all, and those that this process computed on all cores,
            which a busy machine changes least.
        """
        if self._optimize:
            jax.clear_caches()
            gc.collect()
        jitted = jax.jit(
            self.step_function(),
            donate_argnums=() if self._optimizer is None else (0, 1),
            compiler_options=None if self._optimize else UNOPTIMIZED,
        )
        cpu, times = time.process_time(), [time.perf_counter()]
        traced = jitted.trace(*self.arguments())
        times.append(time.perf_counter())
        lowered = traced.lower()
        times.append(time.perf_counter())
        self._compiled = lowered.compile()
        times.append(time.perf_counter())
        cpu = time.process_time() - cpu
        self._counts = counts(lowered, self._compiled)
        stages = {name: b - a for name, (a, b) in zip(STAGES, pairwise(times), strict=True)}
        return stages | {"build_s": times[-1] - times[0], "build_cpu_s": cpu}

    def counts(self) -> dict[str, float]:
        """What can be counted in the program that was built last."""
        return self._counts

    def results(self, steps: int) -> Values:
        """The losses of the first steps, and what they did to the trained arrays.

        That is how far each has moved, or, without an optimizer, the gradient of each.
        """
        self._reset()
        before = self._host(self._trained)
        losses = [float(self._advance()) for _ in range(steps)]
        after = self._host(self._outputs[0])
        self._reset()
        if self._optimizer is None:
            return {"losses": np.array(losses)} | {f"gradient of {n}": g for n, g in after.items()}
        return changes(losses, before, after)

    def _host(self, tree: Any) -> Values:
        arrays = self._program.arrays(jax.tree.map(np.asarray, tree))
        return {name: np.asarray(array, np.float64) for name, array in arrays.items()}

    def arguments(self) -> tuple[Any, ...]:
        """Of the step."""
        return (self._trained, self._state, self._program.frozen, *self._program.batch)

    def _advance(self) -> jax.Array:
        self._outputs = self._compiled(*self.arguments())
        if self._optimizer is not None:
            self._trained, self._state, _ = self._outputs
        return self._outputs[2]

    def step(self, count: int = 1) -> Sample:
        """Run some steps; returns the seconds of one."""
        return {"step_s": machine.seconds(lambda: self._run(count)) / count}

    def _run(self, count: int) -> None:
        for _ in range(count):
            self._advance()
        jax.block_until_ready(self._outputs)

    def memory(self) -> dict[str, float]:
        """The largest memory of the process, and of the device, while it steps."""
        peak = machine.peak_rss(lambda: self._run(2))
        found = {} if peak is None else {"peak_rss_bytes": float(peak)}
        device = jax.local_devices()[0]
        if device.platform != "cpu" and (stats := device.memory_stats()):
            found["peak_device_bytes"] = float(stats["peak_bytes_in_use"])
        return found


def counts(lowered: Any, compiled: Any) -> dict[str, float]:
    """FLOPs and bytes by the compiler's own account, and the size of the program."""
    cost = compiled.cost_analysis()
    memory = compiled.memory_analysis()
    text = lowered.as_text()
    sizes = {
        name: float(getattr(memory, f"{name}_size_in_bytes"))
        for name in ("argument", "output", "alias", "temp")
    }
    return {
        "stablehlo_lines": float(len(text.splitlines())),
        "dot_generals": float(text.count("stablehlo.dot_general")),
        "flops": float((cost[0] if isinstance(cost, list) else cost)["flops"]),
        **{f"{name}_bytes": size for name, size in sizes.items()},
        "peak_bytes": sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"],
    }
