"""Two ways to run parts of an epoch: with the data on the device, or fed from the host."""

from __future__ import annotations

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.training import (
    Batch,
    Compiled,
    DataParallel,
    Step,
    TrainState,
    epoch_order,
    epoch_over_arrays,
    epoch_over_batches,
    prefetch,
    stream,
)

#: Steps that are fed from the host at a time.
CHUNK = 256


class Epochs(Protocol):
    """Runs parts of epochs.

    Attributes:
        grain: Parts end after a multiple of so many steps of the epoch, or at its end. With other
            parts the same steps would be another program.
        compile_seconds: Tracing and compiling so far.
    """

    grain: int

    @property
    def compile_seconds(self) -> float:
        """Tracing and compiling so far."""

    def place(self, order: Any) -> Any:
        """An epoch's order, as `order_of` returns it, where its parts need it."""

    def __call__(
        self, state: TrainState, order: Any, start: int, stop: int
    ) -> tuple[TrainState, np.ndarray]:
        """Steps ``start`` to ``stop`` of an epoch: the state after, and the loss of each."""


@functools.partial(jax.jit, static_argnums=(2, 3))
def order_of(
    key: jax.Array, epoch: int, examples: int, batch_size: int
) -> tuple[jax.Array, jax.Array]:
    """The shuffle of an epoch, with the key ``fold_in(key, epoch)``."""
    return epoch_order(jax.random.fold_in(key, epoch), examples, batch_size)


class Resident:
    """Epochs over arrays on the device: one compiled program, whatever the part."""

    grain = 1

    def __init__(
        self, step: Step, parallel: DataParallel, host: Any, state: TrainState, order: Any
    ):
        def run(state: TrainState, arrays: Any, start: Any, stop: Any, batches: Any) -> Any:
            return epoch_over_arrays(step, state, arrays, batches, start, stop)

        self._parallel = parallel
        self._arrays = parallel.replicate(host)
        bounds = (jnp.int32(0), jnp.int32(0))
        self._run = parallel.compile(run, state, self._arrays, *bounds, self.place(order))

    @property
    def compile_seconds(self) -> float:
        """Tracing and compiling."""
        return self._run.seconds

    def place(self, order: Any) -> Any:
        """The order, split over the devices."""
        return self._parallel.split(order)

    def __call__(
        self, state: TrainState, order: Any, start: int, stop: int
    ) -> tuple[TrainState, np.ndarray]:
        """Steps ``start`` to ``stop`` of an epoch."""
        bounds = (jnp.int32(start), jnp.int32(stop))
        state, metrics = self._run(state, self._arrays, *bounds, order)
        return state, np.asarray(metrics["loss"])[start:stop]


class Streamed:
    """Epochs over chunks cut on the host, one compiled program for each length of chunk."""

    grain = CHUNK

    def __init__(self, step: Step, parallel: DataParallel, host: Any):
        def run(state: TrainState, batches: Batch) -> Any:
            return epoch_over_batches(step, state, batches)

        self._fun, self._parallel, self._host = run, parallel, host
        self._compiled: dict[int, Compiled] = {}

    @property
    def compile_seconds(self) -> float:
        """Tracing and compiling so far."""
        return sum(compiled.seconds for compiled in self._compiled.values())

    def place(self, order: Any) -> Any:
        """The order on the host."""
        return tuple(map(np.asarray, order))

    def __call__(
        self, state: TrainState, order: Any, start: int, stop: int
    ) -> tuple[TrainState, np.ndarray]:
        """Steps ``start`` to ``stop`` of an epoch."""
        indices, weights = (part[start:stop] for part in order)
        losses = []
        chunks = stream(self._host, indices, weights, steps_per_chunk=CHUNK)
        for chunk in prefetch(chunks, self._parallel.split):
            length = len(chunk.weight)
            if length not in self._compiled:
                self._compiled[length] = self._parallel.compile(self._fun, state, chunk)
            state, metrics = self._compiled[length](state, chunk)
            losses.append(metrics["loss"])
        return state, np.concatenate([np.asarray(loss) for loss in losses])
