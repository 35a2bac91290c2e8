"""The options of the scripts: the only home of their defaults, which are the article's preset."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any, Literal

import optax

from jax_lora.config import LoraConfig
from jax_lora.errors import ConfigError
from jax_lora.rules import Init, Scaling

_NO_LIMIT = sys.float_info.max
#: The least and the largest value of each number, where the library itself does not check it.
_RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "epochs": (1, _NO_LIMIT),
    "batch_size": (1, _NO_LIMIT),
    "learning_rate": (0, _NO_LIMIT),
    "momentum": (0, 1),
    "weight_decay": (0, _NO_LIMIT),
    "num_devices": (1, _NO_LIMIT),
    "hidden_dim": (1, _NO_LIMIT),
    "num_hidden": (1, _NO_LIMIT),
    "input_dim": (1, _NO_LIMIT),
    "num_classes": (1, _NO_LIMIT),
    "num_seeds": (1, _NO_LIMIT),
    "save_every_steps": (1, _NO_LIMIT),
    "save_every_minutes": (0, _NO_LIMIT),
    "keep": (1, _NO_LIMIT),
    "requests": (1, _NO_LIMIT),
    "slots": (1, _NO_LIMIT),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What all options share: their ranges are checked when they are made."""

    def __post_init__(self) -> None:
        """Checks every number.

        Raises:
            ConfigError: Names every option that is out of range.
        """
        problems = []
        for name, value in describe(self).items():
            low, high = _RANGES.get(name, (-math.inf, math.inf))
            if name in _RANGES and value is not None and not low <= value <= high:
                span = f"from {low} to {high}" if high < _NO_LIMIT else f"of at least {low}"
                problems.append(f"{_flag(name)} {span}, got {value}")
        if problems:
            raise ConfigError("expected " + "; ".join(problems))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """What is learned.

    Attributes:
        dataset: "auto" is CIFAR-10 where it is prepared or can be downloaded, otherwise digits.
        data_dir: The tensorflow-datasets folder; by default $TFDS_DATA_DIR.
        archive: A cifar-10-binary.tar.gz that you already have, to prepare CIFAR-10 from.
        cache_dir: Where decoded images are kept between runs; by default your cache folder.
    """

    dataset: Literal["auto", "cifar10", "digits"] = "auto"
    data_dir: Path | None = None
    archive: Path | None = None
    cache_dir: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SgdOptions(Options):
    """How far and how fast it is learned.

    Attributes:
        seed: Everything random derives from it.
        epochs: Epochs of a phase.
        batch_size: Examples in a step, over all devices.
        learning_rate: The learning rate.
        momentum: The momentum of SGD.
        weight_decay: L2 regularisation of the trained parameters, as in torch's SGD.
    """

    seed: int = 0
    epochs: int = 5
    batch_size: int = 32
    learning_rate: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(SgdOptions):
    """How it is learned.

    Attributes:
        parallel: Split each batch over the devices with jit and a mesh, or with pmap.
        num_devices: How many devices; by default as many local ones as can share a batch.
        stream: Feed batches from the host in chunks, as for data that does not fit on the device.
    """

    parallel: Literal["jit", "pmap"] = "jit"
    num_devices: int | None = None
    stream: bool = False

    def optimizer(self) -> optax.GradientTransformation:
        """SGD with momentum, as torch has it."""
        return sgd(self.learning_rate, self.momentum, self.weight_decay or None)


def sgd(learning_rate: Any, momentum: float, weight_decay: Any) -> optax.GradientTransformation:
    """SGD with momentum, as torch has it; rate and decay may be traced, no decay is None."""
    steps = optax.sgd(learning_rate, momentum=momentum or None)
    if weight_decay is None:
        return steps
    return optax.chain(optax.add_decayed_weights(weight_decay), steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointOptions(Options):
    """Whether it is saved while it is trained, so that it can go on after an interruption.

    Attributes:
        save_every_steps: Write a training checkpoint after every so many steps, and each epoch.
        save_every_minutes: Write one after every so many minutes, and each epoch.
        keep: How many of the last training checkpoints are kept.
        keep_best: Keep the one with the best test accuracy or training loss as well.
        checkpoints: The folder of the training checkpoints; by default named after --out, or in it
            if it is the folder of a whole run.
        resume: Go on where the last training checkpoint was written, or begin if there is none.
        fall_back: If the last one is damaged, go on from the last good one.
    """

    save_every_steps: int | None = None
    save_every_minutes: float | None = None
    keep: int = 2
    keep_best: Literal["none", "accuracy", "loss"] = "none"
    checkpoints: Path | None = None
    resume: bool = False
    fall_back: bool = False

    def __post_init__(self) -> None:
        """Checks the numbers, and that no option is without effect.

        Raises:
            ConfigError: Names every option that is out of range, or that needs another.
        """
        super().__post_init__()
        if self.fall_back and not self.resume:
            raise ConfigError("expected --resume with --fall-back, got none")
        fields = dataclasses.fields(CheckpointOptions)
        idle = [_flag(f.name) for f in fields if getattr(self, f.name) != f.default]
        if idle and not self.saves:
            raise ConfigError(
                f"expected --save-every-steps, --save-every-minutes or --resume with "
                f"{', '.join(idle)}, got none of them"
            )

    @property
    def saves(self) -> bool:
        """Whether training checkpoints are written."""
        every = (self.save_every_steps, self.save_every_minutes)
        return self.resume or any(x is not None for x in every)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """What is pre-trained.

    Attributes:
        hidden_dim: The width of the hidden layers.
        num_hidden: The number of hidden layers.
    """

    hidden_dim: int = 128
    num_hidden: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraOptions(Options):
    """What is added for fine-tuning.

    Attributes:
        rank: The rank of the update.
        alpha: The strength of the update.
        scaling: What multiplies x A B: "alpha" as in the article, "standard" alpha/r as in the
            paper, "rslora" alpha/sqrt(r).
        init: How A starts: "article" uniform on ±1/sqrt(r), "kaiming" uniform on ±1/sqrt(in),
            "gaussian" normal with standard deviation 1/r, "orthogonal" with orthonormal columns; or
            A and B are parts of the weight, whose product is subtracted: "pissa", "olora".
        targets: Globs of the parameters to adapt.
        exclude: Globs of parameters to leave alone.
        dropout: The probability with which each input of an update is dropped in training.
    """

    rank: int = 32
    alpha: float = 1.0
    scaling: Scaling = "alpha"
    init: Init = "article"
    targets: tuple[str, ...] = ("**/kernel",)
    exclude: tuple[str, ...] = ()
    dropout: float = 0.0

    def lora_config(self) -> LoraConfig:
        """The configuration for the library.

        Raises:
            ConfigError: A value that cannot mean anything.
        """
        names = [field.name for field in dataclasses.fields(LoraOptions)]
        return LoraConfig(**{name: getattr(self, name) for name in names})


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def describe(options: Any) -> dict[str, Any]:
    """Options as JSON-able data."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        return list(value) if isinstance(value, tuple) else value

    fields = dataclasses.fields(options)
    return {field.name: plain(getattr(options, field.name)) for field in fields}


def changes(options: Any) -> dict[str, list[Any]]:
    """The options that differ from their defaults, as ``{name: [default, used]}``."""
    default = describe(type(options)())
    used = describe(options)
    return {name: [default[name], used[name]] for name in used if used[name] != default[name]}
