"""The article's task switch, live: one base, an adapter for each task, and whoever asks."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import jax_lora as jl
from jax_lora.data import Dataset, Split
from jax_lora.experiments.fit import arrays_of, normalize
from jax_lora.experiments.options import DataOptions, LoraOptions, TrainOptions
from jax_lora.experiments.phases import (
    check_dataset,
    finetune,
    load_base,
    load_data,
    save_adapter,
)
from jax_lora.models import MLP

#: The tasks: what is done to the images, given the largest value of a pixel.
TASKS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "upright": lambda images, _: images,
    "turned": lambda images, _: np.rot90(images, axes=(1, 2)),
    "negative": lambda images, largest: (largest - images).astype(images.dtype),
}

_BATCH, _TURNS = 64, 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwitchTasks(LoraOptions, DataOptions, TrainOptions):
    """Switch between tasks: by merging and unmerging, and by an adapter for each request.

    Attributes:
        dataset: By default the one that the base was trained on.
        base: The checkpoint of the base.
        adapters: A folder with an adapter for each task. Those that are not there are trained.
        requests: How many images of each task are asked for.
    """

    dataset: Literal["auto", "cifar10", "digits"] = "auto"
    base: Path
    adapters: Path = Path("runs/tasks")
    requests: int = 500


@dataclasses.dataclass(frozen=True)
class Images:
    """Test images of one task, as the model takes them.

    Attributes:
        pixels: ``[n, pixels]``, in [-1, 1].
        labels: ``[n]``.
    """

    pixels: np.ndarray
    labels: np.ndarray

    def accuracy(self, logits: Any) -> float:
        """The share of images that are classified correctly."""
        return float((np.asarray(logits).argmax(-1) == self.labels).mean())


def run_switch(options: SwitchTasks) -> dict[str, Any]:
    """Train the adapters that are missing, switch, print, and return what was measured."""
    model, params, metadata = load_base(options.base)
    name = metadata["dataset"] if options.dataset == "auto" else options.dataset
    dataset = load_data(dataclasses.replace(options, dataset=name))
    check_dataset(metadata, dataset, options.base)
    print(f"data: {dataset.source}")
    tasks = {name: of_task(dataset, name) for name in TASKS}
    for name, task in tasks.items():
        if not (options.adapters / name).exists():
            plan, phase = finetune(options, model, params, task)
            save_adapter(options.adapters / name, phase, plan, task)
    folder = jl.serving.AdapterFolder(options.adapters, params)
    adapters = {name: folder(name) for name in TASKS}
    images = {name: _test_images(task, options.requests) for name, task in tasks.items()}
    results = {
        "merged": _by_merging(model, params, adapters, images),
        "served": _by_requests(model, params, folder, adapters, images),
    }
    print(_table(results))
    return results


def of_task(dataset: Dataset, name: str) -> Dataset:
    """The data of a task."""

    def changed(split: Split) -> Split:
        images = TASKS[name](split.images, dataset.max_value)
        return dataclasses.replace(split, images=np.ascontiguousarray(images))

    return dataclasses.replace(
        dataset,
        train=changed(dataset.train),
        test=changed(dataset.test),
        source=f"{dataset.source}, {name}",
    )


def _test_images(task: Dataset, count: int) -> Images:
    arrays = arrays_of(task.test)
    pixels = np.asarray(normalize(jnp.asarray(arrays["image"][:count]), task.max_value))
    return Images(pixels, arrays["label"][:count])


def _by_merging(
    model: MLP, params: Any, adapters: dict[str, jl.Adapter], images: dict[str, Images]
) -> dict[str, Any]:
    """The article's switch: take the old product out of the weights, add the new one."""
    merge, apply = jax.jit(jl.merge), jax.jit(model.apply)
    switch = jax.jit(lambda weights, old, new: jl.merge(jl.unmerge(weights, old), new))
    current = list(adapters.values())[-1]
    weights = merge(params, current)
    jax.block_until_ready(switch(weights, current, current))  # compiles
    accuracy, seconds = {}, []
    for name in [*adapters] * _TURNS:
        start = time.perf_counter()
        weights = jax.block_until_ready(switch(weights, current, adapters[name]))
        seconds.append(time.perf_counter() - start)
        current = adapters[name]
        accuracy[name] = images[name].accuracy(apply(weights, images[name].pixels))
    left = jax.tree.leaves(jax.jit(jl.unmerge)(weights, current))
    pairs = zip(left, jax.tree.leaves(params), strict=True)
    return {
        "accuracy": accuracy,
        "switch_ms": 1e3 * float(np.median(seconds)),
        "largest_change": max(float(jnp.abs(a - b).max()) for a, b in pairs),
    }


def _by_requests(
    model: MLP,
    params: Any,
    folder: jl.serving.AdapterFolder,
    adapters: dict[str, jl.Adapter],
    images: dict[str, Images],
) -> dict[str, Any]:
    """An adapter for each request: one task after the other, and another one with every image."""
    like = max(adapters.values(), key=lambda adapter: adapter.nbytes)
    bank = jl.Bank.empty(like, len(adapters))
    config = jl.serving.ServerConfig(batch_sizes=(_BATCH,))
    example = next(iter(images.values())).pixels[0]
    each = [(name, k) for name in images for k in range(len(images[name].labels))]
    mixed = sorted(each, key=lambda request: request[1])
    with jl.serving.Server(
        model.apply, params, bank, example, load=folder, config=config
    ) as server:

        def serve(requests: list[tuple[str, int]]) -> tuple[float, dict[tuple[str, int], Any]]:
            start = time.perf_counter()
            futures = {
                (name, k): server.submit(name, images[name].pixels[k]) for name, k in requests
            }
            logits = {request: future.result() for request, future in futures.items()}
            return 1e3 * (time.perf_counter() - start) / len(requests), logits

        serve(each)  # loads the adapters
        apart, changing = zip(
            *((serve(each)[0], serve(mixed)[0]) for _ in range(_TURNS)), strict=True
        )
        _, logits = serve(mixed)
        stats = server.stats
    apply, accuracy, largest = jax.jit(jl.apply(model.apply)), {}, 0.0
    for name, own in images.items():
        found = np.stack([logits[name, k] for k in range(len(own.labels))])
        accuracy[name] = own.accuracy(found)
        alone = np.asarray(apply(params, adapters[name], own.pixels))
        largest = max(largest, float(np.abs(found - alone).max() / np.abs(alone).max()))
    return {
        "accuracy": accuracy,
        "one_task_after_the_other_ms": float(np.median(apart)),
        "another_with_each_ms": float(np.median(changing)),
        "largest_difference": largest,
        "batches": stats.batches,
        "loads": stats.loads,
    }


def _table(results: dict[str, Any]) -> str:
    merged, served = results["merged"], results["served"]
    rows = [f"{'task':<10} {'merged':>8} {'served':>8}"]
    rows += [
        f"{name:<10} {merged['accuracy'][name]:>8.2%} {served['accuracy'][name]:>8.2%}"
        for name in merged["accuracy"]
    ]
    return "\n".join(
        [
            *rows,
            f"by merging: {merged['switch_ms']:.2f} ms for a switch; afterwards the base without "
            f"adapters differs by at most {merged['largest_change']:.1e} from itself",
            f"by requests: {served['another_with_each_ms']:.3f} ms for one, when each has another "
            f"task than the one before, and {served['one_task_after_the_other_ms']:.3f} ms when "
            f"the tasks come one after the other; {served['loads']} adapters loaded; the base is "
            f"not written to; logits differ by at most {served['largest_difference']:.1e} of the "
            "largest from those of a batch on one adapter",
        ]
    )
