"""What one run of a sweep is, as frozen data, and products of such data."""

from __future__ import annotations

import dataclasses
import itertools
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax_lora.config import LoraConfig
from jax_lora.errors import ConfigError, near_misses

#: What of a configuration the trials of one sweep may differ in.
CONFIGURED = ("rank", "alpha", "scaling", "init", "dtype", "variant", "targets", "exclude")
#: What the loss function applies, which all trials share.
_APPLIED = ("dropout", "mode")
_LARGEST_SEED = 2**32 - 1


class Trial(Mapping[str, Any]):
    """One run, as names and values.

    The fields of `LoraConfig` among them (rank, alpha, scaling, init, dtype, variant, targets,
    exclude) say how its adapter differs from the sweep's configuration. All others are for the
    optimizer: a learning rate, a weight decay, whatever you name.

    Args:
        seed: What is random of it derives from it.
        **values: The rest: finite numbers, strings, booleans, None, or tuples of these.

    Raises:
        ConfigError: Names every value that a trial cannot have.

    Example:
        >>> trial = Trial(seed=1, rank=4, learning_rate=0.1)
        >>> trial.learning_rate, trial["rank"], dict(trial.configured)
        (0.1, 4, {'rank': 4})
    """

    __slots__ = ("_values",)

    _values: dict[str, Any]

    def __init__(self, seed: int = 0, **values: Any):
        named = {"seed": seed, **values}
        plain = {name: _plain(value) for name, value in named.items()}
        problems = [p for name, value in plain.items() if (p := _problem(name, value))]
        if problems:
            raise ConfigError(f"{_shown(named)}: " + "; ".join(problems))
        object.__setattr__(self, "_values", plain)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a trial is not changed; make another: Trial(..., {name}={value!r})")

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __getattr__(self, name: str) -> Any:
        # While it is unpickled there are no values yet.
        values = {} if name == "_values" else self._values
        if name not in values:
            raise unknown_name(name, values)
        return values[name]

    def __reduce__(self) -> Any:
        return _trial, (self._values,)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        return _shown(self._values)

    @property
    def configured(self) -> Mapping[str, Any]:
        """What its adapter has otherwise than the sweep's configuration."""
        return {name: value for name, value in self.items() if name in CONFIGURED}

    @property
    def hyperparameters(self) -> Mapping[str, Any]:
        """Everything that can be of use to an optimizer: all but the seed."""
        return {name: value for name, value in self.items() if name != "seed"}

    def config(self, base: LoraConfig) -> LoraConfig:
        """The configuration of its adapter.

        Raises:
            ConfigError: A value that cannot mean anything.
        """
        try:
            return dataclasses.replace(base, **self.configured)
        except ConfigError as error:
            raise ConfigError(f"{self}: {error}") from error


def _trial(values: Mapping[str, Any]) -> Trial:
    """The trial of some names and values."""
    return Trial(**values)


def grid(**values: Sequence[Any]) -> tuple[Trial, ...]:
    """All combinations of some values, as trials; the last name varies fastest.

    Args:
        **values: For each name, the values it takes.

    Returns:
        The trials.

    Raises:
        ConfigError: Names everything that is no sequence of different values that trials can have.

    Example:
        >>> for trial in grid(rank=(1, 8), learning_rate=(0.1,), seed=range(2)):
        ...     print(trial)
        Trial(seed=0, rank=1, learning_rate=0.1)
        Trial(seed=1, rank=1, learning_rate=0.1)
        Trial(seed=0, rank=8, learning_rate=0.1)
        Trial(seed=1, rank=8, learning_rate=0.1)
    """
    axes, problems = {}, []
    for name, column in values.items():
        try:
            listed = None if isinstance(column, (str, bytes, Mapping)) else list(column)
        except TypeError:
            listed = None
        if listed is None:
            problems.append(
                f"{name}: expected its values, got {column!r}; write {name}=({column!r},)"
            )
        elif not listed:
            problems.append(f"{name}: expected at least one value, got none")
        elif any(value in listed[:k] for k, value in enumerate(listed)):
            problems.append(f"{name}: expected different values, got {listed}")
        else:
            axes[name] = listed
    if problems or not values:
        raise ConfigError("\n  ".join(problems) or "expected names and their values, got none")
    combinations = itertools.product(*axes.values())
    return tuple(Trial(**dict(zip(axes, values, strict=True))) for values in combinations)


def check_trials(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """The trials as a tuple, if they make one sweep.

    Raises:
        ConfigError: There are none, two are the same, or one lacks a name that another has.
    """
    trials = tuple(trials)
    odd = [trial for trial in trials if not isinstance(trial, Trial)]
    if odd or not trials:
        got = type(odd[0]).__name__ if odd else "none"
        raise ConfigError(f"expected trials, such as from grid(rank=(1, 8)), got {got}")
    names = dict.fromkeys(name for trial in trials for name in trial)
    problems = [
        f"{trial}: expected all names that others have, got no {', '.join(missing)}"
        for trial in trials
        if (missing := [name for name in names if name not in trial])
    ]
    twice = [trial for k, trial in enumerate(trials) if trial in trials[:k]]
    problems += [f"{trial}: expected each trial once, got it again" for trial in twice]
    if problems:
        raise ConfigError("\n  ".join(problems))
    return trials


def varied(trials: Sequence[Trial]) -> tuple[str, ...]:
    """The names whose values differ among the trials."""
    names = dict.fromkeys(name for trial in trials for name in trial)
    return tuple(name for name in names if len({trial[name] for trial in trials}) > 1)


def unknown_name(name: str, known: Mapping[str, Any]) -> AttributeError:
    """The error of a name that a trial does not have."""
    return AttributeError(f"a trial has no {name!r} ({near_misses(name, known)})")


def is_number(value: Any) -> bool:
    """Whether a value can be traced: a Python number, and no boolean."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """Numbers of numpy and JAX as Python's, lists as tuples."""
    if isinstance(value, (list, tuple, range)):
        return tuple(_plain(item) for item in value)
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, (bool, str)) or value is None:
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return value


def _problem(name: str, value: Any) -> str:
    """What is wrong with a value; empty if nothing is."""
    if name == "seed" and (type(value) is not int or not 0 <= value <= _LARGEST_SEED):
        return f"expected a seed from 0 to 2**32 - 1, got {value!r}"
    if name in _APPLIED:
        return (
            f"expected no {name}, which the loss function applies, the same for all trials; put it "
            "into the sweep's configuration, and make one sweep for each"
        )
    if hasattr(Trial, name) or name.startswith("_"):
        return f"expected another name than {name!r}, which a trial has for itself"
    parts = value if isinstance(value, tuple) else (value,)
    if not all(part is None or isinstance(part, (bool, str)) or is_number(part) for part in parts):
        return f"expected {name} to be a number, a string, a boolean or None, got {value!r}"
    if any(isinstance(part, float) and not math.isfinite(part) for part in parts):
        return f"expected {name} to be finite, got {value!r}"
    return ""


def _shown(values: Mapping[str, Any]) -> str:
    return f"Trial({', '.join(f'{name}={value!r}' for name, value in values.items())})"
