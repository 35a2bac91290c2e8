"""The article's experiment, step by step: pre-train, save, restore, add LoRA, fine-tune, report."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import jax_lora as jl
from jax_lora import report
from jax_lora.data import Dataset
from jax_lora.errors import ConfigError
from jax_lora.experiments import environment
from jax_lora.experiments.article_values import ARTICLE
from jax_lora.experiments.fit import Evaluator, Phase, data_parallel
from jax_lora.experiments.options import (
    CheckpointOptions,
    DataOptions,
    LoraOptions,
    ModelOptions,
    TrainOptions,
    changes,
    describe,
)
from jax_lora.experiments.phases import (
    check_dataset,
    check_epochs,
    check_lora,
    finetune,
    load_base,
    load_data,
    predict_base,
    predict_lora,
    pretrain,
    same_bits,
    save_adapter,
    save_base,
)
from jax_lora.models import MLP

BASE, ADAPTER, CHECKPOINTS, RESULTS = "base", "adapter", "checkpoints", "results.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrain(CheckpointOptions, ModelOptions, DataOptions, TrainOptions):
    """Pre-train the article's network and save it.

    Attributes:
        out: A new folder for the checkpoint; by default below runs/.
    """

    out: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneLora(CheckpointOptions, LoraOptions, DataOptions, TrainOptions):
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
        force: Use the adapter although it was trained on another base.
    """

    dataset: Literal["auto", "cifar10", "digits"] = "auto"
    base: Path
    adapter: Path | None = None
    merge: bool = False
    force: bool = False


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
class Experiment(LoraOptions, ModelOptions, DataOptions, TrainOptions):
    """All that decides the experiment's numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduce(CheckpointOptions, Experiment):
    """Run the article's whole experiment and write a report.

    Attributes:
        out: A new folder for everything the run leaves; by default below runs/.
    """

    out: Path | None = None


def named_folder(out: Path | None, name: str) -> Path:
    """The folder of a run: as asked for, or below runs/ with the time in its name."""
    return (out or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}").expanduser()


def new_folder(out: Path | None, name: str, *, resume: bool = False) -> Path:
    """The folder of a run, which must hold nothing yet.

    Args:
        out: As asked for.
        name: What begins its name otherwise.
        resume: Whether a run shall go on whose result is written there at its end.

    Raises:
        ConfigError: It already holds something, or it is a file.
    """
    out = named_folder(out, name)
    if out.exists() and not out.is_dir():
        raise ConfigError(
            f"expected --out to be a new or an empty folder; {out} is a file, never overwritten"
        )
    if out.exists() and any(out.iterdir()):
        if resume:
            raise ConfigError(
                f"expected --out of an unfinished run to --resume; {out} already holds something, "
                "as that of a finished one does: for more --epochs give another --out, and the "
                "run's --checkpoints"
            )
        raise ConfigError(
            f"expected --out to be a new or an empty folder; {out} already holds something and is "
            "never overwritten: choose another one, or remove it"
        )
    return out


def training_folder(options: CheckpointOptions, default: Path) -> Path | None:
    """The folder of the training checkpoints, if they are written.

    Raises:
        ConfigError: It shall be resumed from a folder that is new in any case.
    """
    if not options.saves:
        return None
    if options.resume and options.checkpoints is None and getattr(options, "out", None) is None:
        raise ConfigError("expected --out or --checkpoints of the run to --resume, got neither")
    return (options.checkpoints or default).expanduser()


def run_pretrain(options: Pretrain) -> None:
    """Pre-train, save, print."""
    out = new_folder(options.out, "base", resume=options.resume)
    checkpoints = training_folder(options, beside(out))
    dataset = load_data(options)
    print(f"data: {dataset.source}")
    out.mkdir(parents=True, exist_ok=True)  # if it cannot be written, then not after training
    model, phase = pretrain(options, dataset, checkpoints)
    save_base(out, model, dataset, phase)
    print(f"base: {phase.accuracy[-1]:.2%} on the test split; saved in {out}")


def run_finetune(options: FinetuneLora) -> None:
    """Restore a base, fine-tune an adapter, save, print."""
    out = new_folder(options.out, "adapter", resume=options.resume)
    checkpoints = training_folder(options, beside(out))
    model, params, metadata = load_base(options.base)
    dataset = load_data(options)
    check_dataset(metadata, dataset, options.base)
    print(f"data: {dataset.source}")
    out.mkdir(parents=True, exist_ok=True)
    plan, phase = finetune(options, model, params, dataset, checkpoints)
    print(plan)
    save_adapter(out, phase, plan, dataset)
    print(f"adapter: {phase.accuracy[-1]:.2%} on the test split; saved in {out}")


def beside(out: Path) -> Path:
    """Where the training checkpoints of a folder are that is itself a checkpoint."""
    return out.with_name(f"{out.name}-{CHECKPOINTS}")


def run_evaluate(options: Evaluate) -> float:
    """Restore, evaluate, print; returns the accuracy."""
    if options.merge and options.adapter is None:
        raise ConfigError("expected --adapter with --merge, got none")
    model, params, metadata = load_base(options.base)
    dataset_name = metadata["dataset"] if options.dataset == "auto" else options.dataset
    adapter = None
    if options.adapter is not None:
        adapter, _, _ = jl.io.load_adapter(options.adapter, params, options.force)
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
    out = named_folder(options.out, "reproduce")
    checkpoints = training_folder(options, out / CHECKPOINTS)
    if not options.resume:
        new_folder(out, "reproduce")
    elif (out / RESULTS).exists():
        raise ConfigError(f"expected --out of an unfinished run to --resume; {out} is finished")
    options.lora_config()  # refuse bad values before anything is computed
    data_parallel(options)
    dataset = load_data(options)
    data_seconds = time.perf_counter() - start
    print(f"data: {dataset.source} ({data_seconds:.1f} s)")
    check_lora(options, dataset)
    check_epochs(options, out / BASE)
    out.mkdir(parents=True, exist_ok=True)

    folders = [checkpoints and checkpoints / name for name in (BASE, ADAPTER)]
    model, base = pretrain(options, dataset, folders[0])
    if not (out / BASE).exists():
        save_base(out / BASE, model, dataset, base)
    restored_model, params, _ = load_base(out / BASE)
    if not same_bits(params, base.state.trained):
        raise ConfigError(f"expected {out / BASE} to be the base of this run; choose another --out")
    plan, lora = finetune(options, restored_model, params, dataset, folders[1])
    if not (out / ADAPTER).exists():
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
        "notes": _notes(dataset, base, lora),
    }
    reference = ARTICLE if dataset.name == "cifar10" else None
    report.write_tensorboard(results, out / "tensorboard")
    report.write_plots(results, out, reference)
    results["seconds"]["total"] = time.perf_counter() - start
    report.write_json(results, out / RESULTS)
    report.write_report(results, out / "report.md", reference)
    print(
        f"base {base.accuracy[-1]:.2%}, LoRA {lora.accuracy[-1]:.2%} on the test split; "
        f"{results['seconds']['total']:.1f} s in all; see {out / 'report.md'}"
    )
    return results


def _changes(options: Reproduce) -> dict[str, list[Any]]:
    """The options that depart from the article's preset."""
    same_numbers = {"out", "seed", "parallel", "num_devices", "stream"}
    for kind in (DataOptions, CheckpointOptions):
        same_numbers |= {field.name for field in dataclasses.fields(kind)}
    return {name: pair for name, pair in changes(options).items() if name not in same_numbers}


def _notes(dataset: Dataset, *phases: Phase) -> list[str]:
    if dataset.name != "cifar10":
        notes = ["This run is not on CIFAR-10, so its numbers say nothing about the article's."]
    else:
        notes = [
            "The article's LoRA table repeats the base's multiply-adds, because its counter does "
            "not see A and B; the table here counts x A and (x A) B."
        ]
    if any(phase.resumed_at for phase in phases):
        steps = "; ".join(
            f"{name} after the steps {', '.join(map(str, phase.resumed_at)) or 'none'}"
            for name, phase in zip((BASE, "LoRA"), phases, strict=True)
        )
        notes.append(
            f"This run was interrupted and resumed ({steps}). Its seconds are those of the "
            "training that was kept, and of the last compilation."
        )
    return notes


def _disk_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
