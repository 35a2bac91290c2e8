"""How a sweep is run, as frozen data: the only home of these defaults."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Literal, get_args

from jax_lora.errors import ConfigError

Order = Literal["same", "own"]
Mode = Literal["max", "min"]


@dataclasses.dataclass(frozen=True)
class Halving:
    """Successive halving: after some epochs the worse trials stop.

    A trial that stops keeps what it has learned so far. The others move together, so that what is
    saved is whole programs of ``Settings.slots`` trials: with as many slots as trials nothing is.

    Attributes:
        epochs: After which epochs, counted from 1.
        keep: The share of the trials still running that goes on, rounded up.

    References:
        Jamieson and Talwalkar 2015, Non-stochastic Best Arm Identification and Hyperparameter
        Optimization, arXiv:1502.07943.
    """

    epochs: tuple[int, ...]
    keep: float = 0.5

    def __post_init__(self) -> None:
        listed = isinstance(self.epochs, Iterable) and not isinstance(self.epochs, str)
        object.__setattr__(self, "epochs", tuple(self.epochs) if listed else (self.epochs,))
        if any(type(epoch) is not int for epoch in self.epochs):
            raise ConfigError(f"expected epochs as integers, got {self.epochs!r}")
        if type(self.keep) not in (int, float) or not 0 < self.keep < 1:
            raise ConfigError(f"expected to keep a share between 0 and 1, got keep={self.keep!r}")
        rising = all(a < b for a, b in itertools.pairwise(self.epochs))
        if not self.epochs or min(self.epochs) < 1 or not rising:
            raise ConfigError(
                f"expected epochs from 1 in rising order after which to stop, got {self.epochs!r}"
            )


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the trials of a sweep are trained, measured and packed.

    Attributes:
        epochs: How often each trial sees all examples.
        batch_size: Examples in a step of each trial.
        order: Whether all trials see the ``"same"`` batches, so that what does not depend on the
            trial is computed once, or each its ``"own"``, shuffled by its own key.
        slots: How many trials are trained at the same time; by default all that fit into one
            program. With fewer slots than trials one program is run several times.
        pad: The size of the largest adapter of a program as a multiple of its smallest. By default
            one program holds all ranks; with 1 each rank has its own, and no zero is computed.
        halving: When the worse trials stop; None for never.
        metric: What decides which trial is better: the only one there is, by default, or without
            any the mean training loss of the last epoch.
        mode: Whether a larger or a smaller value of the metric is better; a loss is always better
            when smaller.
        evaluation_batch: Examples in a step of the evaluation.

    Raises:
        ConfigError: Names every value that cannot mean anything.
    """

    epochs: int
    batch_size: int
    order: Order = "same"
    slots: int | None = None
    pad: float = math.inf
    halving: Halving | None = None
    metric: str | None = None
    mode: Mode = "max"
    evaluation_batch: int = 1000

    def __post_init__(self) -> None:
        problems = [
            f"expected {name} of at least 1, an integer; got {value!r}"
            for name in ("epochs", "batch_size", "slots", "evaluation_batch")
            if (value := getattr(self, name)) is not None and (type(value) is not int or value < 1)
        ]
        for name, kind in (("order", Order), ("mode", Mode)):
            if getattr(self, name) not in get_args(kind):
                choices = " or ".join(map(repr, get_args(kind)))
                problems.append(f"expected {name} to be {choices}, got {getattr(self, name)!r}")
        if type(self.pad) not in (int, float) or not self.pad >= 1:
            problems.append(f"expected pad to be a multiple of at least 1, got {self.pad!r}")
        if not isinstance(self.halving, Halving | None):
            problems.append(f"expected a Halving or None, got halving={self.halving!r}")
        if self.halving is not None and not problems and self.halving.epochs[-1] >= self.epochs:
            problems.append(
                f"expected to stop trials before the last of {self.epochs} epochs, got halving "
                f"after epochs {self.halving.epochs}"
            )
        if problems:
            raise ConfigError("\n  ".join(problems))

    @property
    def rungs(self) -> tuple[tuple[int, int], ...]:
        """The spans of epochs between which trials stop."""
        cuts = (0, *(self.halving.epochs if self.halving else ()), self.epochs)
        return tuple(itertools.pairwise(cuts))
