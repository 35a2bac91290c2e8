"""The article's experiment, step by step: pre-train, save, restore, add LoRA, fine-tune, report."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import jax_lora as jl
from jax_lora import report
from jax_lora.adapter import leaves_by_path
from jax_lora.data import Dataset, load
from jax_lora.errors import CheckpointError, ConfigError
from jax_lora.experiments import environment
from jax_lora.experiments.article_values import ARTICLE
from jax_lora.experiments.fit import Evaluator, Phase, data_parallel, fit
from jax_lora.experiments.options import (
    DataOptions,
    LoraOptions,
    ModelOptions,
    TrainOptions,
    changes,
    describe,
)
from jax_lora.models import MLP

BASE, ADAPTER = "base", "adapter"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrain(ModelOptions, DataOptions, TrainOptions):
    """Pre-train the article's network and save it.

    Attributes:
        out: A new folder for the checkpoint; by default below runs/.
    """

    out: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneLora(LoraOptions, DataOptions, TrainOptions):
    """Fine-tune a saved base with LoRA and save the adapter.

    Attributes:
        base: The checkpoint of the base.
        out: A new folder for the checkpoint; by default below runs/.
    """

    base: Path
    out: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(DataOptions):
    """Measure the accuracy of a base, with or without an adapter.

    Attributes:
        dataset: By default the one that the base was trained on.
        base: The checkpoint of the base.
        adapter: The checkpoint of an adapter.
        merge: Fold the adapter into the base before evaluating.
    """

    dataset: Literal["auto", "cifar10", "digits"] = "auto"
    base: Path
    adapter: Path | None = None
    merge: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summarize(ModelOptions, LoraOptions):
    """Print the tables of the base and of the LoRA model.

    Attributes:
        base: A checkpoint to summarise instead of a fresh network.
        adapter: The checkpoint of its adapter, instead of one made from the options.
        batch_size: Examples in the batch that the table is for.
        input_dim: Inputs of a fresh network.
        num_classes: Outputs of a fresh network.
    """

    base: Path | None = None
    adapter: Path | None = None
    batch_size: int = 32
    input_dim: int = 3072
    num_classes: int = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduce(LoraOptions, ModelOptions, DataOptions, TrainOptions):
    """Run the article's whole experiment and write a report.

    Attributes:
        out: A new folder for everything the run leaves; by default below runs/.
    """

    out: Path | None = None


def load_data(options: DataOptions) -> Dataset:
    """The data set that the options name."""
    return load(
        options.dataset,
        data_dir=options.data_dir,
        archive=options.archive,
        cache_dir=options.cache_dir,
    )


def new_folder(out: Path | None, name: str) -> Path:
    """The folder of a run, which must hold nothing yet.

    Raises:
        ConfigError: It already holds something, or it is a file.
    """
    if out is None:
        out = Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    out = out.expanduser()
    if out.exists() and not out.is_dir():
        raise ConfigError(
            f"expected --out to be a new or an empty folder; {out} is a file, never overwritten"
        )
    if out.exists() and any(out.iterdir()):
        raise ConfigError(
            f"expected --out to be a new or an empty folder; {out} already holds something and is "
            "never overwritten: choose another one, or remove it"
        )
    return out


def predict_base(model: MLP) -> Any:
    """The base model for `fit`: all of its parameters are trained."""
    return lambda params, frozen, images: model.apply(params, images)


def predict_lora(model: MLP) -> Any:
    """The adapted model for `fit`: the adapter is trained beside the frozen parameters."""
    adapted = jl.apply(model.apply)
    return lambda adapter, params, images: adapted(params, adapter, images)


def network(options: Any, dataset: Dataset) -> MLP:
    """The network that `Pretrain` or `Reproduce` describe."""
    return MLP((*[options.hidden_dim] * options.num_hidden, dataset.num_classes))


def plan_lora(options: Any, model: MLP, params: Any, dataset: Dataset) -> jl.Plan:
    """What `FinetuneLora` or `Reproduce` adapt; ``params`` may be abstract."""
    batch = (options.batch_size, int(np.prod(dataset.image_shape)))
    example = jax.ShapeDtypeStruct(batch, np.float32)
    return jl.plan(model.apply, params, example, config=options.lora_config())


def check_lora(options: Any, dataset: Dataset) -> None:
    """Refuse a rank or a target that the network does not have before it is trained."""
    model = network(options, dataset)
    image = jax.ShapeDtypeStruct((1, int(np.prod(dataset.image_shape))), np.float32)
    plan_lora(options, model, jax.eval_shape(model.init, jax.random.key(0), image), dataset)


def pretrain(options: Any, dataset: Dataset) -> tuple[MLP, Phase]:
    """Train the network from scratch, as `Pretrain` or `Reproduce` say."""
    model = network(options, dataset)
    init_key, shuffle_key = jax.random.split(jax.random.fold_in(jax.random.key(options.seed), 0))
    example = np.zeros((1, int(np.prod(dataset.image_shape))), np.float32)
    params = jax.jit(model.init)(init_key, example)
    phase = fit(
        predict_base(model),
        params,
        None,
        options.optimizer(),
        dataset,
        options,
        shuffle_key,
        "pre-training",
    )
    return model, phase


def finetune(options: Any, model: MLP, params: Any, dataset: Dataset) -> tuple[jl.Plan, Phase]:
    """Train an adapter beside frozen parameters, as `FinetuneLora` or `Reproduce` say."""
    init_key, shuffle_key = jax.random.split(jax.random.fold_in(jax.random.key(options.seed), 1))
    plan = plan_lora(options, model, params, dataset)
    adapter = jl.init(init_key, params, plan)
    phase = fit(
        predict_lora(model),
        adapter,
        params,
        jl.optim.lora_optimizer(options.optimizer()),
        dataset,
        options,
        shuffle_key,
        "LoRA",
    )
    return plan, phase


def save_base(folder: Path, model: MLP, dataset: Dataset, phase: Phase) -> None:
    """Write the pre-trained base with what is needed to use it."""
    metadata = {
        "features": list(model.features),
        "image_shape": list(dataset.image_shape),
        "max_value": dataset.max_value,
        "dataset": dataset.name,
        "accuracy": phase.accuracy[-1],
    }
    jl.io.save_params(folder, phase.state.trained, metadata)


def load_base(folder: Path) -> tuple[MLP, Any, dict[str, Any]]:
    """Read what `save_base` wrote.

    Raises:
        CheckpointError: It is missing or damaged, or its parameters are not those of its network.
    """
    params, metadata = jl.io.load_params(folder)
    missing = {"features", "image_shape", "max_value", "dataset"} - set(metadata)
    if missing:
        raise CheckpointError(
            f"{folder}: expected a base written by pretrain.py or reproduce_cifar10.py; its "
            f"metadata lacks {', '.join(sorted(missing))}"
        )
    model = MLP(tuple(metadata["features"]))
    example = jax.ShapeDtypeStruct((1, int(np.prod(metadata["image_shape"]))), np.float32)
    expected = jax.eval_shape(model.init, jax.random.key(0), example)
    shapes = [
        {path: tuple(leaf.shape) for path, leaf in leaves_by_path(tree).items()}
        for tree in (expected, params)
    ]
    if shapes[0] != shapes[1]:
        raise CheckpointError(f"{folder}: expected the shapes {shapes[0]}, found {shapes[1]}")
    return model, params, metadata


def check_dataset(metadata: Mapping[str, Any], dataset: Dataset, base: Path) -> None:
    """Check that a base was made for images like these.

    Raises:
        ConfigError: The images have another shape.
    """
    if tuple(metadata["image_shape"]) != dataset.image_shape:
        raise ConfigError(
            f"{base} was trained on {metadata['dataset']} images of shape "
            f"{tuple(metadata['image_shape'])}, got {dataset.name} images of shape "
            f"{dataset.image_shape}; pass --dataset {metadata['dataset']}"
        )


def run_pretrain(options: Pretrain) -> None:
    """Pre-train, save, print."""
    out = new_folder(options.out, "base")
    dataset = load_data(options)
    print(f"data: {dataset.source}")
    out.mkdir(parents=True, exist_ok=True)  # if it cannot be written, then not after training
    model, phase = pretrain(options, dataset)
    save_base(out, model, dataset, phase)
    print(f"base: {phase.accuracy[-1]:.2%} on the test split; saved in {out}")


def run_finetune(options: FinetuneLora) -> None:
    """Restore a base, fine-tune an adapter, save, print."""
    out = new_folder(options.out, "adapter")
    model, params, metadata = load_base(options.base)
    dataset = load_data(options)
    check_dataset(metadata, dataset, options.base)
    print(f"data: {dataset.source}")
    out.mkdir(parents=True, exist_ok=True)
    plan, phase = finetune(options, model, params, dataset)
    print(plan)
    save_adapter(out, phase, plan, dataset)
    print(f"adapter: {phase.accuracy[-1]:.2%} on the test split; saved in {out}")


def save_adapter(folder: Path, phase: Phase, plan: jl.Plan, dataset: Dataset) -> None:
    """Write a trained adapter with its configuration."""
    metadata = {"dataset": dataset.name, "accuracy": phase.accuracy[-1]}
    jl.io.save_adapter(folder, phase.state.trained, plan.config, metadata)


def run_evaluate(options: Evaluate) -> float:
    """Restore, evaluate, print; returns the accuracy."""
    if options.merge and options.adapter is None:
        raise ConfigError("expected --adapter with --merge, got none")
    model, params, metadata = load_base(options.base)
    dataset_name = metadata["dataset"] if options.dataset == "auto" else options.dataset
    adapter = None
    if options.adapter is not None:
        adapter, _, _ = jl.io.load_adapter(options.adapter, params)
    dataset = load_data(dataclasses.replace(options, dataset=dataset_name))
    check_dataset(metadata, dataset, options.base)
    if adapter is not None and options.merge:
        params, adapter = jl.merge(params, adapter), None
    predict = predict_base(model) if adapter is None else predict_lora(model)
    trained, frozen = (params, None) if adapter is None else (adapter, params)
    parallel = data_parallel(TrainOptions(num_devices=1))
    evaluator = Evaluator(predict, dataset.test, dataset.max_value, parallel, trained, frozen)
    accuracy = evaluator(trained, frozen)
    what = "base" if options.adapter is None else "base + adapter"
    print(f"{what}: {accuracy:.2%} of {len(dataset.test):,} test images ({dataset.source})")
    return accuracy


def run_summary(options: Summarize) -> None:
    """Print both tables."""
    if options.adapter is not None and options.base is None:
        raise ConfigError("expected --base with --adapter, got none")
    if options.base is not None:
        model, params, metadata = load_base(options.base)
        input_dim = int(np.prod(metadata["image_shape"]))
    else:
        features = (*[options.hidden_dim] * options.num_hidden, options.num_classes)
        model, input_dim = MLP(features), options.input_dim
        example = jax.ShapeDtypeStruct((1, input_dim), np.float32)
        params = jax.eval_shape(model.init, jax.random.key(0), example)
    batch = jax.ShapeDtypeStruct((options.batch_size, input_dim), np.float32)
    if options.adapter is not None:
        adapter, _, _ = jl.io.load_adapter(options.adapter, params)
    else:
        plan = jl.plan(model.apply, params, batch, config=options.lora_config())
        adapter = jax.eval_shape(lambda: jl.init(jax.random.key(0), params, plan))
        print(plan, end="\n\n")
    print(jl.summary(model.apply, params, batch), end="\n\n")
    print(jl.summary(model.apply, params, batch, adapter=adapter))


def run_reproduce(options: Reproduce) -> dict[str, Any]:
    """The whole experiment; returns what ``results.json`` holds."""
    start = time.perf_counter()
    out = new_folder(options.out, "reproduce")
    options.lora_config()  # refuse bad values before anything is computed
    data_parallel(options)
    dataset = load_data(options)
    data_seconds = time.perf_counter() - start
    print(f"data: {dataset.source} ({data_seconds:.1f} s)")
    check_lora(options, dataset)
    out.mkdir(parents=True, exist_ok=True)

    model, base = pretrain(options, dataset)
    save_base(out / BASE, model, dataset, base)
    restored_model, params, _ = load_base(out / BASE)
    plan, lora = finetune(options, restored_model, params, dataset)
    save_adapter(out / ADAPTER, lora, plan, dataset)

    adapter = lora.state.trained
    batch = jax.ShapeDtypeStruct(
        (options.batch_size, int(np.prod(dataset.image_shape))), np.float32
    )
    tables = {
        "base": jl.summary(model.apply, params, batch),
        "lora": jl.summary(model.apply, params, batch, adapter=adapter),
    }
    _, on_disk, _ = load_base(out / BASE)
    results = {
        "dataset": dataset.name,
        "dataset_source": dataset.source,
        "seed": options.seed,
        "command": shlex.join(["python", *sys.argv]),
        "config": describe(options),
        "config_changes": _changes(options),
        "steps_per_epoch": base.steps_per_epoch,
        "loss_window": base.loss_window,
        "base": {
            "params": tables["base"].total_params,
            "accuracy": base.accuracy,
            "loss": base.loss,
        },
        "lora": {
            "trainable_params": tables["lora"].trainable_params,
            "total_params": tables["lora"].total_params,
            "rank": options.rank,
            "alpha": options.alpha,
            "accuracy_before": lora.accuracy_before,
            "accuracy": lora.accuracy,
            "loss": lora.loss,
        },
        "seconds": {
            "data": data_seconds,
            "base": {"compile": base.compile_seconds, "run": base.run_seconds},
            "lora": {"compile": lora.compile_seconds, "run": lora.run_seconds},
        },
        "base_unchanged": same_bits(on_disk, lora.state.frozen),
        "adapter_bytes": adapter.nbytes,
        "base_bytes": tables["base"].param_bytes,
        "adapter_disk_bytes": _disk_bytes(out / ADAPTER),
        "base_disk_bytes": _disk_bytes(out / BASE),
        "gradient_bytes": {name: table.trained_bytes for name, table in tables.items()},
        "optimizer_bytes": {"base": base.optimizer_bytes, "lora": lora.optimizer_bytes},
        "tables": {name: str(table) for name, table in tables.items()},
        "versions": environment.versions(),
        "hardware": environment.hardware(),
        "notes": _notes(dataset),
    }
    reference = ARTICLE if dataset.name == "cifar10" else None
    report.write_tensorboard(results, out / "tensorboard")
    report.write_plots(results, out, reference)
    results["seconds"]["total"] = time.perf_counter() - start
    report.write_json(results, out / "results.json")
    report.write_report(results, out / "report.md", reference)
    print(
        f"base {base.accuracy[-1]:.2%}, LoRA {lora.accuracy[-1]:.2%} on the test split; "
        f"{results['seconds']['total']:.1f} s in all; see {out / 'report.md'}"
    )
    return results


def same_bits(left: Any, right: Any) -> bool:
    """Whether two trees have the same structure and bitwise the same leaves."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (left, right)]
    if structures[0] != structures[1]:
        return False

    def same(a: Any, b: Any) -> bool:
        a, b = np.asarray(a), np.asarray(b)
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()

    return all(jax.tree.leaves(jax.tree.map(same, left, right)))


def _changes(options: Reproduce) -> dict[str, list[Any]]:
    """The options that depart from the article's preset."""
    same_numbers = {"out", "seed", "parallel", "num_devices", "stream"}
    same_numbers |= {field.name for field in dataclasses.fields(DataOptions)}
    return {name: pair for name, pair in changes(options).items() if name not in same_numbers}


def _notes(dataset: Dataset) -> list[str]:
    if dataset.name != "cifar10":
        return ["This run is not on CIFAR-10, so its numbers say nothing about the article's."]
    return [
        "The article's LoRA table repeats the base's multiply-adds, because its counter does not "
        "see A and B; the table here counts x A and (x A) B."
    ]


def _disk_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
