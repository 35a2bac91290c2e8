"""The two phases of the article's experiment, and what is read and written between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jax_lora as jl
from jax_lora.adapter import leaves_by_path
from jax_lora.data import Dataset, load
from jax_lora.errors import CheckpointError, ConfigError
from jax_lora.experiments.fit import Phase, Watch, fit
from jax_lora.experiments.options import DataOptions, ModelOptions, TrainOptions, describe
from jax_lora.experiments.saving import Saving
from jax_lora.models import MLP

#: Options that may change while a phase goes on: they say how far and on what, not what.
_MAY_CHANGE = {"epochs", "parallel", "num_devices", "stream"}


def load_data(options: DataOptions) -> Dataset:
    """The data set that the options name."""
    return load(
        options.dataset,
        data_dir=options.data_dir,
        archive=options.archive,
        cache_dir=options.cache_dir,
    )


def predict_base(model: MLP) -> Any:
    """The base model for `fit`: all of its parameters are trained."""
    return lambda params, frozen, images: model.apply(params, images)


def predict_lora(model: MLP) -> Any:
    """The adapted model for `fit`: the adapter is trained beside the frozen parameters."""
    adapted = jl.apply(model.apply)
    return lambda adapter, params, images: adapted(params, adapter, images)


def predict_noisy(model: MLP, rates: Mapping[str, float]) -> Any:
    """The adapted model in training, with dropout."""
    adapted = jl.apply(model.apply)
    return lambda adapter, params, images, key: adapted(
        params, jl.dropout(adapter, key, rates), images
    )


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


def pretrain(options: Any, dataset: Dataset, checkpoints: Path | None = None) -> tuple[MLP, Phase]:
    """Train the network from scratch, as `Pretrain` or `Reproduce` say.

    Args:
        options: These.
        dataset: The data.
        checkpoints: The folder for training checkpoints, if they shall be written.
    """
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
        saving=_saving(options, checkpoints, dataset, TrainOptions, ModelOptions),
    )
    return model, phase


def finetune(
    options: Any,
    model: MLP,
    params: Any,
    dataset: Dataset,
    checkpoints: Path | None = None,
    watch: Watch | None = None,
) -> tuple[jl.Plan, Phase]:
    """Train an adapter beside frozen parameters, as `FinetuneLora` or `Reproduce` say.

    Args:
        options: These.
        model: The network.
        params: Its parameters.
        dataset: The data.
        checkpoints: The folder for training checkpoints, if they shall be written.
        watch: As in `fit`.
    """
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
        noisy=predict_noisy(model, plan.dropout) if options.dropout else None,
        saving=_saving(options, checkpoints, dataset, TrainOptions, config=plan.config),
        watch=watch,
    )
    return plan, phase


def _saving(
    options: Any,
    checkpoints: Path | None,
    dataset: Dataset,
    *kinds: type,
    config: jl.LoraConfig | None = None,
) -> Saving | None:
    """The training checkpoints of a phase that depends on these kinds of options."""
    if checkpoints is None:
        return None
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)} - _MAY_CHANGE
    run = {name: value for name, value in describe(options).items() if name in names}
    data = {"dataset": dataset.name, "examples": len(dataset.train)}
    return Saving(checkpoints, options, run | data, config)


def save_base(folder: Path, model: MLP, dataset: Dataset, phase: Phase) -> None:
    """Write the pre-trained base with what is needed to use it."""
    metadata = {
        "features": list(model.features),
        "image_shape": list(dataset.image_shape),
        "max_value": dataset.max_value,
        "dataset": dataset.name,
        "epochs": len(phase.accuracy),
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


def check_epochs(options: Any, base: Path) -> None:
    """Check that the base of a run that goes on, if it is saved, is trained as long as it shall be.

    Raises:
        ConfigError: It is not. To train it on would leave the adapter without its base.
    """
    if not base.exists():
        return
    done = load_base(base)[2].get("epochs", options.epochs)
    if done != options.epochs:
        raise ConfigError(
            f"expected --epochs {done}, as {base} is saved after so many, got {options.epochs}; "
            "begin another run with another --out"
        )


def save_adapter(folder: Path, phase: Phase, plan: jl.Plan, dataset: Dataset) -> None:
    """Write a trained adapter with its configuration."""
    metadata = {"dataset": dataset.name, "accuracy": phase.accuracy[-1]}
    state = phase.state
    jl.io.save_adapter(folder, state.trained, plan.config, metadata, base=state.frozen)


def same_bits(left: Any, right: Any) -> bool:
    """Whether two trees have the same structure and bitwise the same leaves."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (left, right)]
    if structures[0] != structures[1]:
        return False

    def same(a: Any, b: Any) -> bool:
        a, b = np.asarray(a), np.asarray(b)
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()

    return all(jax.tree.leaves(jax.tree.map(same, left, right)))
