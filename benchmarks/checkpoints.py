"""What saving a 100 MB adapter state costs the training: the call, the steps beside it, the whole.

The state is an adapter with Adam's two moments, trained by a jitted step that reuses the memory of
its arguments. `scanned` has it in few large arrays, as of a model whose layers are scanned,
`unrolled` in many small ones. In turns, `jl.io.Checkpoints` and orbax's own `CheckpointManager`
with its asynchronous checkpointer save while the training goes on:

* `blocked` is how long the call took;
* `lost` is how much longer the steps took until the checkpoint was whole than as many take
  undisturbed, the call included: on a CPU the thread that writes competes with them;
* `whole` is how long it took from the call until the checkpoint was whole.

Then each is restored. `Checkpoints` also has checksums of every array, made and checked. Nothing is
asserted about times: they are printed beside what is expected.

Usage:
    python benchmarks/checkpoints.py --save benchmarks/results/checkpoints-cpu.json
    python benchmarks/checkpoints.py --quick
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import jax_lora as jl
from jax_lora.experiments.environment import hardware, versions

#: What we mean to stay within: 5 % of a second.
TARGET_BLOCKED_S = 0.05
OURS, ORBAX = "jl.io.Checkpoints", "orbax CheckpointManager"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A model of ``kinds`` weights ``[width, width]`` in each layer."""

    layers: int = 32
    kinds: int = 7
    width: int = 512
    rank: int = 36
    batch: int = 32


QUICK = Sizes(layers=3, kinds=2, width=8, rank=2, batch=4)


def scanned(params: Any, x: jax.Array) -> jax.Array:
    """The layers as a scan over stacked weights ``[layers, width, width]``."""

    def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
        for weight in weights.values():
            x = x + jnp.tanh(x @ weight)
        return x, None

    return jax.lax.scan(layer, x, params)[0]


def unrolled(params: Any, x: jax.Array) -> jax.Array:
    """The same layers one by one, with weights of their own."""
    for weights in params.values():
        for weight in weights.values():
            x = x + jnp.tanh(x @ weight)
    return x


def scanned_params(sizes: Sizes) -> Any:
    """``{kind: [layers, width, width]}``."""
    rng = np.random.default_rng(0)
    shape = (sizes.layers, sizes.width, sizes.width)
    draw = {f"w{k}": rng.standard_normal(shape, np.float32) for k in range(sizes.kinds)}
    return {name: jnp.asarray(0.1 / sizes.width * w) for name, w in draw.items()}


def unrolled_params(sizes: Sizes) -> Any:
    """``{layer: {kind: [width, width]}}``."""
    stacked = scanned_params(sizes)
    return {
        f"layer{i}": {name: weight[i] for name, weight in stacked.items()}
        for i in range(sizes.layers)
    }


MODELS: dict[str, tuple[Callable[..., Any], Callable[[Sizes], Any]]] = {
    "scanned": (scanned, scanned_params),
    "unrolled": (unrolled, unrolled_params),
}


class Training:
    """An adapter that is trained, one step after the other."""

    def __init__(self, model: str, sizes: Sizes):
        fun, make = MODELS[model]
        self.params = make(sizes)
        x = jnp.asarray(
            np.random.default_rng(1).standard_normal((sizes.batch, sizes.width), np.float32)
        )
        self.plan = jl.plan(fun, self.params, x, config=jl.LoraConfig(rank=sizes.rank))
        optimizer = jl.optim.lora_optimizer(optax.adam(1e-3))
        self.adapter = jl.init(jax.random.key(0), self.params, self.plan)
        self.opt_state = optimizer.init(self.adapter)
        adapted = jl.apply(fun)

        def loss(adapter: Any, params: Any, x: jax.Array) -> jax.Array:
            return (adapted(params, adapter, x) ** 2).mean()

        def step(adapter: Any, opt_state: Any, params: Any, x: jax.Array) -> Any:
            value, grads = jax.value_and_grad(loss)(adapter, params, x)
            updates, opt_state = optimizer.update(grads, opt_state, adapter)
            return optax.apply_updates(adapter, updates), opt_state, value

        self._step = jax.jit(step, donate_argnums=(0, 1))
        self._x = x

    @property
    def leaves(self) -> list[jax.Array]:
        """All arrays that are saved."""
        return jax.tree.leaves((self.adapter, self.opt_state))

    def step(self) -> float:
        """A step; returns its seconds."""
        start = time.perf_counter()
        self.adapter, self.opt_state, loss = self._step(
            self.adapter, self.opt_state, self.params, self._x
        )
        loss.block_until_ready()
        return time.perf_counter() - start


class Ours:
    """`jl.io.Checkpoints`."""

    def __init__(self, training: Training, folder: Path):
        self._training = training
        config = training.plan.config
        self._saved = jl.io.Checkpoints(folder, base=training.params, config=config, keep=2)

    def save(self, step: int) -> None:
        """Begin a save."""
        self._saved.save(step, self._training.adapter, self._training.opt_state)

    @property
    def busy(self) -> bool:
        """Whether it is not whole yet."""
        return self._saved.busy

    def wait(self) -> None:
        """Until it is."""
        self._saved.wait()

    def restore(self) -> Any:
        """Read the last one."""
        found = self._saved.restore(self._training.adapter, self._training.opt_state)
        return found.trained, found.opt_state

    def close(self) -> None:
        """The end."""
        self._saved.close()


class Orbax:
    """Orbax's manager with the same two items."""

    def __init__(self, training: Training, folder: Path):
        self._training = training
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(folder, options=options)

    def save(self, step: int) -> None:
        """Begin a save."""
        adapter = {path: entry.arrays() for path, entry in self._training.adapter.items()}
        items = {"arrays": adapter, "training": self._training.opt_state}
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self._manager.save(step, args=ocp.args.Composite(**args))

    @property
    def busy(self) -> bool:
        """Whether it is not whole yet."""
        return bool(self._manager.is_saving_in_progress())

    def wait(self) -> None:
        """Until it is."""
        self._manager.wait_until_finished()

    def restore(self) -> Any:
        """Read the last one."""
        adapter = {path: entry.arrays() for path, entry in self._training.adapter.items()}
        items = {"arrays": adapter, "training": self._training.opt_state}
        args = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
        found = self._manager.restore(self._manager.latest_step(), args=ocp.args.Composite(**args))
        return found["arrays"], found["training"]

    def close(self) -> None:
        """The end."""
        self._manager.close()


WRITERS: dict[str, Callable[[Training, Path], Any]] = {OURS: Ours, ORBAX: Orbax}


def measure(training: Training, turns: int, steps: int) -> dict[str, Any]:
    """Seconds of each writer's saves and restores, those of the first save apart."""
    kinds = ("blocked_s", "lost_s", "whole_s", "restore_s")
    found: dict[str, dict[str, list[float]]] = {w: {k: [] for k in kinds} for w in WRITERS}
    with tempfile.TemporaryDirectory() as folder:
        writers = {
            name: make(training, Path(folder) / str(k))
            for k, (name, make) in enumerate(WRITERS.items())
        }
        for turn, (name, writer) in itertools.product(range(turns + 1), writers.items()):
            undisturbed = statistics.median(training.step() for _ in range(steps))
            start = time.perf_counter()
            writer.save(turn + 1)
            blocked = time.perf_counter() - start
            beside = list(_steps_while(training, writer))
            writer.wait()
            whole = time.perf_counter() - start
            start = time.perf_counter()
            jax.block_until_ready(writer.restore())
            restore = time.perf_counter() - start
            lost = blocked + sum(beside) - len(beside) * undisturbed
            for kind, value in zip(kinds, (blocked, lost, whole, restore), strict=True):
                found[name][kind].append(value)
        for writer in writers.values():
            writer.close()
    return {
        name: {kind: {"first": v[0], "later": v[1:]} for kind, v in values.items()}
        for name, values in found.items()
    }


def _steps_while(training: Training, writer: Any) -> Iterator[float]:
    while writer.busy:
        yield training.step()


def table(results: Sequence[dict[str, Any]]) -> str:
    """Medians of the later saves, and the largest, in milliseconds."""
    lines = ["| state | writer | blocked | lost | whole | restore |", "|" + " --- |" * 6]
    for result in results:
        for name, values in result["writers"].items():
            cells = [f"{result['model']}, {result['arrays']} arrays", name]
            for value in values.values():
                middle, most = statistics.median(value["later"]), max(value["later"])
                cells.append(f"{1e3 * middle:.0f} ms (at most {1e3 * most:.0f})")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measures, prints, saves if asked, and returns what was measured."""
    parser = argparse.ArgumentParser(description="What saving a 100 MB adapter state costs.")
    parser.add_argument("--turns", type=int, default=7, help="saves that are counted")
    parser.add_argument("--steps", type=int, default=10, help="undisturbed steps before each save")
    parser.add_argument("--quick", action="store_true", help="a tiny state, to see that it works")
    parser.add_argument("--save", type=Path, help="JSON file for all times")
    args = parser.parse_args(argv)
    load = round(os.getloadavg()[0], 2)
    machine, found = hardware() | {"load_average_before": load}, versions()
    print(", ".join(f"{key} {value}" for key, value in (machine | found).items()), flush=True)
    results: list[dict[str, Any]] = []
    for model in MODELS:
        training = Training(model, QUICK if args.quick else Sizes())
        training.step()
        results.append(
            {
                "model": model,
                "arrays": len(training.leaves),
                "megabytes": sum(leaf.nbytes for leaf in training.leaves) / 1e6,
                "step_s": statistics.median(training.step() for _ in range(args.steps)),
                "writers": measure(training, args.turns, args.steps),
            }
        )
        print(f"{model}: {results[-1]['megabytes']:.1f} MB", flush=True)
    print("\n" + table(results) + "\n")
    for result in results:
        got = statistics.median(result["writers"][OURS]["blocked_s"]["later"])
        verdict = "reached" if got <= TARGET_BLOCKED_S else "missed"
        print(
            f"blocked, {result['model']}: expected at most {TARGET_BLOCKED_S * 1e3:.0f} ms, got "
            f"{got * 1e3:.1f} ms: {verdict}"
        )
    if args.save is not None:
        args.save.parent.mkdir(parents=True, exist_ok=True)
        saved = {"hardware": machine, "versions": found, "results": results}
        args.save.write_text(json.dumps(saved, indent=2) + "\n")
        print(f"saved to {args.save}")
    return results


if __name__ == "__main__":
    main()
