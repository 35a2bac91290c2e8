"""What a sweep costs: many adapters in one program, beside one run after another.

Both train LoRA adapters of rank 32 on the article's network, images and batches of 32, with SGD and
momentum:

* `alone`: the epoch that `jax_lora.experiments` runs for one adapter, one compiled program, called
  for one adapter after another.
* `vmap`: the same under `jax.vmap`, as one would write it without `jl.sweep`: all adapters in it,
  on the same batches.
* `same`: the epoch of `jl.sweep` with all adapters in it, on the same batches.
* `own`: the same, each adapter on the batches of its own shuffle.

First they must agree: after an epoch from the same start every factor of every adapter is that of
the run alone, within a tolerance. Then they take turns on a part of an epoch, so that a busy moment
of the machine does not fall on one of them alone; a ratio is the median of the ratios of single
turns, beside the least and the largest. `--scale` times `same` for more and more adapters, up to
what the memory holds. Nothing is asserted about times.

Usage:
    python benchmarks/sweep.py --save benchmarks/results/sweep-cpu.json
    python benchmarks/sweep.py --scale 1 4 16 64 256 1024
    python benchmarks/sweep.py --quick
"""

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_lora as jl
from jax_lora.experiments.environment import hardware, versions
from jax_lora.experiments.fit import losses_of
from jax_lora.experiments.options import LoraOptions, TrainOptions
from jax_lora.experiments.phases import predict_lora
from jax_lora.models import MLP
from jax_lora.sweep.program import Program, Slots, Task
from jax_lora.sweep.stacking import stack, unstack
from jax_lora.training import TrainState, epoch_order, epoch_over_arrays, train_step

# How many times as many adapters a second as alone we mean to train at least.
TARGET = 2.0
# On a GPU: 64 adapters within as many times the time of one.
TARGET_SCALE, SCALE_TRIALS = 2.0, 64
# Between a factor in the sweep and alone: the largest difference over the largest element.
TOLERANCE = 1e-4
ORDERS = ("same", "own")
#: An epoch of all adapters, ready to be timed, from their start: a function without arguments.
Ready = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """The middle, the least and the largest of some ratios."""

    median: float
    least: float
    largest: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f}-{self.largest:.2f})"


@dataclass(frozen=True)
class Result:
    """What was measured.

    Attributes:
        trials: The number of adapters.
        steps: Steps in a turn.
        difference: By program, the largest difference from the run alone.
        seconds: By program, the seconds of each turn: of all adapters.
        speedup: By program, how many times as fast as one after another.
    """

    trials: int
    steps: int
    difference: dict[str, float]
    seconds: dict[str, list[float]]
    speedup: dict[str, Spread]


class Bench:
    """The article's experiment on some images.

    Args:
        images: ``[examples, height, width, channels]`` uint8, as many as a turn has.
        labels: ``[examples]`` int32.
        rank: The rank of each adapter.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, rank: int):
        self.train = TrainOptions()
        inputs = images.reshape(len(images), -1)
        self.arrays = jax.device_put({"image": inputs, "label": labels})
        self.steps = -(-len(images) // self.train.batch_size)
        model = MLP((128, 128, 10))
        example = jax.ShapeDtypeStruct((self.train.batch_size, inputs.shape[1]), jnp.float32)
        self.params = jax.jit(model.init)(jax.random.key(0), jnp.zeros(example.shape))
        config = LoraOptions(rank=rank).lora_config()
        self.plan = jl.plan(model.apply, self.params, example, config=config)
        self.loss_fun = losses_of(predict_lora(model), 255)

    def optimizer(self, trial: Any) -> optax.GradientTransformation:
        """The article's."""
        return optax.sgd(trial.learning_rate, momentum=self.train.momentum)

    def trials(self, count: int) -> list[jl.sweep.Trial]:
        """That many, which differ in their seed."""
        rate = self.train.learning_rate
        return [jl.sweep.Trial(seed=k, learning_rate=rate) for k in range(count)]

    def adapters(self, count: int) -> list[jl.Adapter]:
        """Fresh ones."""
        return [jl.init(jax.random.key(k), self.params, self.plan) for k in range(count)]

    def order(self, key: jax.Array) -> Any:
        """The batches of a shuffle."""
        key = jax.random.fold_in(key, 0)
        return epoch_order(key, len(self.arrays["label"]), self.train.batch_size)

    def alone(self) -> Callable[[jl.Adapter, jax.Array], Any]:
        """An epoch of one adapter, compiled: from the adapter and the shuffle's key."""
        return self._compiled(self.adapters(1)[0], lambda step: step)

    def vmapped(self, count: int) -> Callable[[jl.Adapter, jax.Array], Any]:
        """The same of a stack of adapters."""
        axes: Any = TrainState(None, 0, None, 0)  # type: ignore[arg-type]
        stacked = stack(self.adapters(count))
        return self._compiled(
            stacked, lambda step: jax.vmap(step, in_axes=(axes, None), out_axes=(axes, 0))
        )

    def _compiled(self, adapter: jl.Adapter, mapped: Callable[[Any], Any]) -> Any:
        optimizer = jl.optim.lora_optimizer(self.optimizer(self.trials(1)[0]))
        step = mapped(train_step(self.loss_fun, optimizer))
        order = jax.jit(self.order)

        def epoch(state: TrainState, arrays: Any, batches: Any) -> Any:
            return epoch_over_arrays(step, state, arrays, batches)

        def start(adapter: jl.Adapter) -> TrainState:
            return TrainState.create(adapter, optimizer, self.params)

        arguments = start(adapter), self.arrays, order(jax.random.key(0))
        compiled = jax.jit(epoch).lower(*arguments).compile()
        return lambda adapter, key: compiled(start(adapter), self.arrays, order(key))[0].trained

    def sweep(self, count: int) -> tuple[Program, Callable[[list[jl.Adapter], Any], Slots]]:
        """The program of a sweep, and what loads it."""
        settings = jl.sweep.Settings(epochs=1, batch_size=self.train.batch_size)
        devices = jax.local_devices()
        task = Task(self.loss_fun, self.params, self.arrays, False, self.optimizer).placed(devices)
        data = self.trials(count)
        program = Program(task, settings, data, count, devices)

        def load(adapters: list[jl.Adapter], keys: Any) -> Slots:
            states = [program.start(t, a) for t, a in zip(data, adapters, strict=True)]
            return program.load(data, stack(adapters), stack(states), keys)

        return program, load


def difference(found: Sequence[Any], alone: Sequence[Any]) -> float:
    """The largest difference of a factor over its largest element."""

    def of(one: jax.Array, other: jax.Array) -> float:
        return float(jnp.abs(one - other).max() / jnp.maximum(jnp.abs(other).max(), 1e-30))

    return max(jax.tree.leaves(jax.tree.map(of, list(found), list(alone))))


def order_keys(order: str, trials: int) -> Any:
    """The key of the shuffle that all adapters share, or one for each."""
    keys = jax.random.split(jax.random.key(1), trials)
    return keys if order == "own" else keys[0]


def measure(bench: Bench, trials: int, turns: int) -> Result:
    """Check that they agree, then let them take turns.

    Raises:
        SystemExit: An adapter of the sweep is not that of the run alone, or nothing was learned.
    """
    adapters, shared = bench.adapters(trials), order_keys("same", trials)
    alone, vmapped, stacked = bench.alone(), bench.vmapped(trials), stack(adapters)
    ready: dict[str, Callable[[], Ready]] = {
        "alone": lambda: lambda: [alone(adapter, shared) for adapter in adapters],
        "vmap": lambda: lambda: vmapped(stacked, shared),
    }
    check(adapters, alone, unstack(vmapped(stacked, shared), trials), [shared] * trials)
    differences = {}
    for order in ORDERS:
        program, load = bench.sweep(trials)
        keys = order_keys(order, trials)
        slots, _ = program.epoch(load(adapters, keys), 0)
        each = list(keys) if order == "own" else [keys] * trials
        differences[order] = check(adapters, alone, unstack(slots.trained, trials), each)
        ready[order] = _loaded(program, load, adapters, keys)
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(turns):
        for name, load_all in ready.items():
            seconds[name].append(_timed(load_all()))
    speedup = {}
    for name in ("vmap", *ORDERS):
        found = [one / all_ for one, all_ in zip(seconds["alone"], seconds[name], strict=True)]
        speedup[name] = Spread(statistics.median(found), min(found), max(found))
    return Result(trials, bench.steps, differences, seconds, speedup)


def check(
    adapters: Sequence[jl.Adapter], alone: Any, found: Sequence[jl.Adapter], keys: Sequence[Any]
) -> float:
    """How far adapters are from those trained alone.

    Raises:
        SystemExit: Too far, or these learned nothing.
    """
    expected = [alone(adapter, key) for adapter, key in zip(adapters, keys, strict=True)]
    apart, learned = difference(found, expected), difference(adapters, expected)
    if not apart < TOLERANCE < learned:
        raise SystemExit(
            f"expected every adapter to learn what it learns alone, within {TOLERANCE}; they "
            f"differ by {apart:.1e}, and learning made a difference of {learned:.1e}"
        )
    return apart


def _loaded(
    program: Program, load: Any, adapters: list[jl.Adapter], keys: Any
) -> Callable[[], Ready]:
    """What loads a program, which is not timed, and returns what runs it."""

    def load_all() -> Ready:
        slots = load(adapters, keys)
        jax.block_until_ready(slots.trained)
        return lambda: program.epoch(slots, 0)[1]

    return load_all


def _timed(run: Ready) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def scale(bench: Bench, counts: Sequence[int], turns: int) -> dict[int, list[float]]:
    """The seconds of a turn for each number of adapters, as far as the memory reaches."""
    seconds: dict[int, list[float]] = {}
    for trials in counts:
        try:
            program, load = bench.sweep(trials)
            key, adapters = order_keys("same", trials), bench.adapters(trials)
            program.epoch(load(adapters, key), 0)  # compiles
            ready = _loaded(program, load, adapters, key)
            seconds[trials] = [_timed(ready()) for _ in range(turns)]
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            print(f"{trials} adapters: {str(error).splitlines()[0]}")
            break
        del program, load, adapters, ready
        gc.collect()
    return seconds


def table(result: Result) -> str:
    """The times as a Markdown table."""
    lines = [
        f"| {result.trials} adapters | milliseconds a step, all | adapters x steps a second "
        "| times as fast as alone |",
        "| --- | --- | --- | --- |",
    ]
    for name, found in result.seconds.items():
        step = statistics.median(found) / result.steps
        faster = result.speedup.get(name, "1")
        lines.append(f"| {name} | {1e3 * step:.2f} | {result.trials / step:,.0f} | {faster} |")
    return "\n".join(lines)


def scale_table(seconds: dict[int, list[float]], steps: int) -> str:
    """The times for each number of adapters, and whether the GPU's target is reached."""
    medians = {trials: statistics.median(found) / steps for trials, found in seconds.items()}
    lines = ["| adapters | milliseconds a step, all | adapters x steps a second |"]
    lines.append("| --- | --- | --- |")
    for trials, step in medians.items():
        lines.append(f"| {trials} | {1e3 * step:.2f} | {trials / step:,.0f} |")
    if {1, SCALE_TRIALS} <= set(medians):
        ratio = medians[SCALE_TRIALS] / medians[1]
        lines.append("")
        lines.append(_verdict(f"{SCALE_TRIALS} adapters / one", ratio, ratio <= TARGET_SCALE))
        lines[-1] += f" (expected on a GPU: at most {TARGET_SCALE})"
    return "\n".join(lines)


def _verdict(what: str, got: float, reached: bool) -> str:
    return f"{what}: got {got:.2f}: {'reached' if reached else 'missed'}"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, from `argv` or from `sys.argv`."""
    parser = argparse.ArgumentParser(description="A sweep beside one run after another.")
    parser.add_argument("--trials", type=_positive, default=16, help="adapters")
    parser.add_argument("--rank", type=_positive, default=32, help="the rank of each")
    parser.add_argument("--steps", type=_positive, default=200, help="steps in a turn")
    parser.add_argument("--turns", type=_positive, default=9, help="how often each is run")
    parser.add_argument("--scale", type=_positive, nargs="+", help="also time these many adapters")
    parser.add_argument("--data-dir", help="the tensorflow-datasets folder with CIFAR-10")
    parser.add_argument(
        "--quick", action="store_true", help="tiny made-up images, and only check that they agree"
    )
    parser.add_argument("--save", type=Path, help="JSON file for all times")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> Result:
    """Checks, measures, prints, saves if asked, and returns what was measured."""
    args = parse_args(argv)
    if args.quick:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (72, 4, 4, 1), np.uint8)
        labels = rng.integers(0, 10, 72, np.int32)
        result = measure(Bench(images, labels, min(args.rank, 4)), min(args.trials, 3), 1)
        print(f"sweep and alone agree within {TOLERANCE}: {result.difference}")
        return result
    from jax_lora.data import load

    if args.save is not None:
        args.save.parent.mkdir(parents=True, exist_ok=True)
    images_wanted = args.steps * TrainOptions().batch_size
    split = load("cifar10", data_dir=args.data_dir).train
    bench = Bench(split.images[:images_wanted], split.labels[:images_wanted], args.rank)
    cpu_load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    machine, found = hardware() | {"load_average_before": cpu_load}, versions()
    print(", ".join(f"{key} {value}" for key, value in (machine | found).items()), flush=True)
    result = measure(bench, args.trials, args.turns)
    differences = ", ".join(f"{name} {value:.1e}" for name, value in result.difference.items())
    print(f"largest differences from alone: {differences}\n\n{table(result)}\n")
    faster = result.speedup["same"].median
    print(_verdict(f"same / alone, expected at least {TARGET}", faster, faster >= TARGET))
    scaled = scale(bench, args.scale, args.turns) if args.scale else {}
    if scaled:
        print(f"\n{scale_table(scaled, bench.steps)}")
    if args.save is not None:
        saved = {
            "hardware": machine,
            "versions": found,
            "settings": {"rank": args.rank, "turns": args.turns, "tolerance": TOLERANCE},
            "expected": {"same / alone": TARGET},
            **asdict(result),
            "scale_seconds": scaled,
        }
        args.save.write_text(json.dumps(saved, indent=2) + "\n")
        print(f"saved to {args.save}")
    return result


if __name__ == "__main__":
    main()
