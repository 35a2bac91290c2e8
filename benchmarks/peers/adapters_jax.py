"""An adapter in JAX, for `benchmarks.adapters`: ours, in two formats, and written out by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import jax_lora as jl
from benchmarks.adapters import Held, two_adapters
from benchmarks.compiled import UNOPTIMIZED
from benchmarks.harness import Values
from benchmarks.models import Factored, scanned_transformer
from benchmarks.peers import plain
from benchmarks.transformer import MATRICES, Task

Pairs = Mapping[str, tuple[jax.Array, jax.Array]]


def path_of(name: str) -> str:
    """The path of a matrix in the parameters."""
    return f"layers/{name}/kernel"


class _Jax(Held):
    """What the programs share: a loss and a merge that take the adapter as an argument."""

    def __init__(self, task: Task, loss: Any, merge: Any, adapters: list[Any]) -> None:
        options = None if task.optimize else UNOPTIMIZED
        self.params, self.adapters = plain.params_of(task), adapters
        self._batch = plain.batch_of(task)
        self._loss = jax.jit(loss, compiler_options=options)
        self._merge = jax.jit(merge, compiler_options=options)
        self._made: Any = None
        self._read: Any = None

    def loss(self, which: int) -> float:
        """The loss; the adapter is an argument."""
        return float(self._loss(self.params, self.adapters[which], *self._batch))

    def merge(self) -> None:
        """New parameters."""
        self._made = jax.block_until_ready(self._merge(self.params, self.adapters[0]))

    def merged(self) -> Values:
        """These; they are not kept."""
        layers, self._made = self._made["layers"], None
        return {name: np.asarray(layers[name]["kernel"], np.float64) for name in MATRICES}

    def loaded(self) -> Values:
        """The pairs that were read."""
        arrays = plain.arrays_of(self.pairs_of(self._read))
        return {name: np.asarray(array, np.float64) for name, array in arrays.items()}

    def pairs_of(self, adapter: Any) -> Pairs:
        """An adapter's factors by the matrix's name."""
        return adapter


class ByHand(_Jax):
    """Factors in a dictionary, and orbax."""

    def __init__(self, task: Task) -> None:
        def loss(params: Any, pairs: Pairs, tokens: jax.Array) -> jax.Array:
            return scanned_transformer(plain.with_weights(params, pairs, Factored), tokens)

        def merge(params: Any, pairs: Pairs) -> Any:
            return plain.with_weights(params, pairs, lambda w, a, b: w + a @ b)

        adapters = [
            {n: tuple(jnp.asarray(arrays[f"{n} {ab}"]) for ab in "ab") for n in MATRICES}
            for arrays in two_adapters(task)
        ]
        super().__init__(task, loss, merge, adapters)

    def save(self, folder: Path) -> None:
        """Write the dictionary."""
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, self.adapters[0])

    def load(self, folder: Path) -> None:
        """Read it."""
        with ocp.StandardCheckpointer() as checkpointer:
            self._read = jax.block_until_ready(checkpointer.restore(folder, self.adapters[0]))


class Ours(_Jax):
    """`jl.apply`, `jl.merge` and `jl.io`."""

    def __init__(self, task: Task) -> None:
        shapes = jax.eval_shape(lambda: plain.params_of(task))
        config = jl.LoraConfig(task.rank, task.rank, tuple(map(path_of, MATRICES)))
        plan = jl.plan(scanned_transformer, shapes, *plain.batch_of(task), config=config)
        fresh = jax.eval_shape(lambda: jl.init(jax.random.key(0), shapes, plan))

        def entry(arrays: Mapping[str, np.ndarray], name: str) -> Any:
            a, b = (jnp.asarray(arrays[f"{name} {ab}"]) for ab in "ab")
            return dataclasses.replace(fresh[path_of(name)], a=a, b=b, scale=jnp.float32(1))

        adapters = [
            jl.Adapter({path_of(name): entry(arrays, name) for name in MATRICES})
            for arrays in two_adapters(task)
        ]
        self._config = plan.config
        super().__init__(task, jl.apply(scanned_transformer), jl.merge, adapters)

    def pairs_of(self, adapter: Any) -> Pairs:
        """The factors of its entries."""
        return {name: (adapter[path_of(name)].a, adapter[path_of(name)].b) for name in MATRICES}

    def save(self, folder: Path) -> None:
        """A checkpoint, with checksums."""
        jl.io.save_adapter(folder, self.adapters[0], self._config)

    def load(self, folder: Path) -> None:
        """Read it, and compare the checksums."""
        self._read = jax.block_until_ready(jl.io.load_adapter(folder, self.params)[0])


class OursInPeftFiles(Ours):
    """The same in the files of PEFT."""

    NAMES = (jl.peft.Name("layers/{name}/kernel", "layers.{k}.{name}.weight", "linear", "io"),)

    def save(self, folder: Path) -> None:
        """A folder of PEFT."""
        jl.peft.save(folder, self.adapters[0], self.params, self.NAMES)

    def load(self, folder: Path) -> None:
        """Read it."""
        found = jl.peft.load(folder, self.params, self.NAMES)
        self._read = jax.block_until_ready(found.adapter)
