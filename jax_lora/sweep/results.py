"""What a sweep found: each trial's curves and adapter, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from jax_lora.adapter import Adapter
from jax_lora.config import LoraConfig
from jax_lora.errors import ConfigError, near_misses
from jax_lora.io import save_adapter
from jax_lora.sweep.trials import Trial, varied
from jax_lora.tables import count, format_table

#: The mean training loss of the last epoch, among the metrics.
TRAINING_LOSS = "training_loss"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One trial, trained.

    Attributes:
        trial: The trial.
        config: The configuration of its adapter.
        adapter: What was learned, at its true rank.
        loss: The mean training loss of each epoch.
        metrics: Each metric before the first epoch and after each, so one value more than epochs.
        stopped: Why it ended before the last epoch; empty if it did not.
    """

    trial: Trial
    config: LoraConfig
    adapter: Adapter
    loss: tuple[float, ...]
    metrics: dict[str, tuple[float, ...]]
    stopped: str = ""

    @property
    def epochs(self) -> int:
        """How many epochs it was trained."""
        return len(self.loss)

    def final(self, metric: str) -> float:
        """The last value of a metric, or of the training loss.

        Raises:
            ConfigError: There is no such metric.
        """
        if metric in self.metrics:
            return self.metrics[metric][-1]
        if metric == TRAINING_LOSS:
            return self.loss[-1]
        known = (*self.metrics, TRAINING_LOSS)
        raise ConfigError(f"no metric {metric!r} was measured ({near_misses(metric, known)})")

    def save(self, folder: str | Path, base: Any = None) -> None:
        """Write the adapter for `jax_lora.io.load_adapter`, with its trial and what it came to.

        Args:
            folder: The checkpoint: a folder that does not exist yet, or is empty.
            base: The parameters that it was trained on, to recognise them.

        Raises:
            CheckpointError: As `jax_lora.io.save_adapter`.
            AdapterError: As there.
        """
        finals = {name: self.final(name) for name in (*self.metrics, TRAINING_LOSS)}
        metadata = {"trial": plain(self.trial), "epochs": self.epochs, **finals}
        save_adapter(folder, self.adapter, self.config, metadata, base)


@dataclasses.dataclass(frozen=True)
class Results(Sequence[Outcome]):
    """The outcomes of all trials, in the order in which they were given.

    Attributes:
        outcomes: One for each trial.
        metric: What decides which is better.
        mode: Whether that is a larger or a smaller value.
        epochs: How many epochs were asked for.
        compilations: How many programs were compiled.
        compile_seconds: How long that took.
        run_seconds: Training and measuring.
        slot_epochs: Epochs that programs ran, times their slots: what was computed.
    """

    outcomes: tuple[Outcome, ...]
    metric: str
    mode: str
    epochs: int
    compilations: int
    compile_seconds: float
    run_seconds: float
    slot_epochs: int

    @overload
    def __getitem__(self, index: int) -> Outcome: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Outcome, ...]: ...
    def __getitem__(self, index: Any) -> Any:
        return self.outcomes[index]

    def __len__(self) -> int:
        return len(self.outcomes)

    def __iter__(self) -> Iterator[Outcome]:
        return iter(self.outcomes)

    def __str__(self) -> str:
        return self.table()

    @property
    def ranking(self) -> tuple[Outcome, ...]:
        """The outcomes from best to worst: those that got furthest first."""
        return tuple(sorted(self.outcomes, key=lambda outcome: self._order(outcome)))

    @property
    def best(self) -> Outcome:
        """The best of those that got furthest.

        Raises:
            ConfigError: Every trial diverged.
        """
        best = self.ranking[0]
        if not math.isfinite(best.final(self.metric)):
            raise ConfigError(
                "expected a trial with a finite loss, got none: all diverged; lower the learning "
                "rates or alphas"
            )
        return best

    def by(self, *names: str) -> dict[tuple[Any, ...], tuple[Outcome, ...]]:
        """The outcomes by the values of some names, in the order in which these came first.

        Raises:
            AttributeError: The trials have no such name.
        """
        groups: dict[tuple[Any, ...], list[Outcome]] = {}
        for outcome in self.outcomes:
            values = tuple(getattr(outcome.trial, name) for name in names)
            groups.setdefault(values, []).append(outcome)
        return {values: tuple(outcomes) for values, outcomes in groups.items()}

    def table(self) -> str:
        """All trials from best to worst; where there are several seeds, then their means too."""
        names = varied([outcome.trial for outcome in self.outcomes])
        fixed = {name: v for name, v in self.outcomes[0].trial.items() if name not in names}
        metrics = self._metrics()
        header = (*names, "trained", "epochs", *metrics, "")
        rows = [
            (
                *(_word(outcome.trial[name]) for name in names),
                count(outcome.adapter.trainable_params),
                str(outcome.epochs),
                *(_number(outcome.final(metric)) for metric in metrics),
                outcome.stopped,
            )
            for outcome in self.ranking
        ]
        fixed_words = ", ".join(f"{name} {_word(value)}" for name, value in fixed.items())
        right = range(len(header) - 1)
        lines = [
            f"{len(self)} trials, best by {self.mode} {self.metric}"
            + (f"; all: {fixed_words}" if fixed else ""),
            format_table(header, rows, right),
        ]
        if means := self._means(names, metrics):
            lines += ["", means]
        full = len(self) * self.epochs
        lines.append(
            f"{self.slot_epochs} epochs of {full} computed; {self.compilations} compilations in "
            f"{self.compile_seconds:.1f} s, {self.run_seconds:.1f} s of training and measuring"
        )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Everything but the adapters, as JSON-able data."""
        trials = [
            {
                "trial": plain(o.trial),
                "trainable_params": o.adapter.trainable_params,
                "loss": list(o.loss),
                "metrics": {name: list(values) for name, values in o.metrics.items()},
                "stopped": o.stopped,
            }
            for o in self.outcomes
        ]
        names = ("metric", "mode", "epochs", "compilations", "compile_seconds", "run_seconds")
        kept = {name: getattr(self, name) for name in (*names, "slot_epochs")}
        return {**kept, "best": self.outcomes.index(self.ranking[0]), "trials": trials}

    def _order(self, outcome: Outcome) -> tuple[bool, int, float]:
        value = outcome.final(self.metric)
        return (
            not math.isfinite(value),
            -outcome.epochs,
            -value if self.mode == "max" else value,
        )

    def _metrics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.metric, *self.outcomes[0].metrics, TRAINING_LOSS)))

    def _means(self, names: Sequence[str], metrics: Sequence[str]) -> str:
        """A table of means over seeds, if there are several; empty otherwise."""
        others = [name for name in names if name != "seed"]
        if "seed" not in names or not others:
            return ""
        rows = [
            (
                *(_word(value) for value in values),
                str(len(same)),
                *(_spread([outcome.final(metric) for outcome in same]) for metric in metrics),
            )
            for values, same in self.by(*others).items()
        ]
        header = (*others, "seeds", *(f"{metric}, mean ± sd" for metric in metrics))
        return format_table(header, rows, range(len(header)))


def plain(trial: Trial) -> dict[str, Any]:
    """A trial as JSON-able data."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in trial.items()}


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:.4f}"


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return _number(values[0])
    if not all(map(math.isfinite, values)):
        return _number(math.nan)
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"
