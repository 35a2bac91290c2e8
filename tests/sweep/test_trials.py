"""Trials and grids: what they hold, and what they refuse."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.sweep import Halving, Settings, Trial, grid
from jax_lora.sweep.trials import check_trials, varied


def test_a_trial_is_a_value() -> None:
    trial = Trial(seed=3, rank=4, learning_rate=0.1)
    assert dict(trial) == {"seed": 3, "rank": 4, "learning_rate": 0.1}
    assert (trial.seed, trial.rank, trial["learning_rate"]) == (3, 4, 0.1)
    assert trial == Trial(learning_rate=0.1, rank=4, seed=3) != Trial(seed=3, rank=4)
    assert len({trial, Trial(learning_rate=0.1, rank=4, seed=3)}) == 1
    for same in (copy.deepcopy(trial), pickle.loads(pickle.dumps(trial))):
        assert same == trial
    with pytest.raises(AttributeError, match="make another"):
        trial.rank = 5
    with pytest.raises(AttributeError, match=r"no 'learning_rat' .*nearest: 'learning_rate'"):
        trial.learning_rat  # noqa: B018
    assert repr(trial) == "Trial(seed=3, rank=4, learning_rate=0.1)"


def test_numbers_of_numpy_are_pythons() -> None:
    trial = Trial(seed=np.int64(1), rate=jnp.float32(0.5), sizes=[np.int32(1), 2], on=True, to=None)
    assert [type(value) for value in trial.values()] == [int, float, tuple, bool, type(None)]


def test_what_is_of_the_configuration_goes_there() -> None:
    trial = Trial(rank=4, alpha=2.0, init="gaussian", rate=0.1)
    config = trial.config(jl.LoraConfig(rank=1, dropout=0.1))
    assert config == jl.LoraConfig(rank=4, alpha=2.0, init="gaussian", dropout=0.1)
    assert set(trial.hyperparameters) == {"rank", "alpha", "init", "rate"}
    with pytest.raises(jl.ConfigError, match=r"Trial\(seed=0, rank=0\): expected a rank"):
        Trial(rank=0).config(jl.LoraConfig())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seed": -1}, r"seed from 0 to 2\*\*32 - 1, got -1"),
        ({"seed": 2**32}, "got 4294967296"),
        ({"seed": 1.0}, "got 1.0"),
        ({"rate": float("nan")}, "rate to be finite, got nan"),
        ({"rate": np.ones(2)}, "rate to be a number, a string"),
        ({"rate": 1, "keys": 2}, "another name than 'keys'"),
        ({"_rate": 1}, "another name than '_rate'"),
        ({"dropout": 0.1}, "no dropout, which the loss function applies"),
        ({"mode": "auto", "rate": float("inf")}, "no mode.*; expected rate to be finite"),
    ],
)
def test_values_that_a_trial_cannot_have(values: Any, words: str) -> None:
    with pytest.raises(jl.ConfigError, match=words):
        Trial(**values)


def test_a_grid_has_every_combination() -> None:
    trials = grid(rank=(1, 2), rate=(0.1, 0.2, 0.3), seed=range(2))
    assert len(set(trials)) == len(trials) == 2 * 3 * 2
    assert [t.seed for t in trials[:4]] == [0, 1, 0, 1]
    assert {(t.rank, t.rate) for t in trials} == {(r, x) for r in (1, 2) for x in (0.1, 0.2, 0.3)}
    assert varied(trials) == ("seed", "rank", "rate")
    assert varied(grid(rank=(1, 2), rate=(0.1,))) == ("rank",)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (
            {"init": "article"},
            r"init: expected its values, got 'article'; write init=\('article',\)",
        ),
        ({"rank": 4}, r"write rank=\(4,\)"),
        ({"rank": ()}, "rank: expected at least one value, got none"),
        ({"rank": (1, 1)}, r"rank: expected different values, got \[1, 1\]"),
        ({}, "expected names and their values"),
    ],
)
def test_grids_that_are_none(axes: Any, words: str) -> None:
    with pytest.raises(jl.ConfigError, match=words):
        grid(**axes)


def test_all_mistakes_of_a_grid_at_once() -> None:
    with pytest.raises(jl.ConfigError, match=r"(?s)rank.*init"):
        grid(rank=4, init="article")


@pytest.mark.parametrize(
    ("trials", "words"),
    [
        ((), "expected trials, such as from grid.*, got none"),
        (({"rank": 1},), "got dict"),
        ((Trial(rank=1), Trial(rank=1)), "each trial once, got it again"),
        ((Trial(rank=1), Trial(rate=1)), r"(?s)no rate\n.*no rank"),
    ],
)
def test_trials_that_make_no_sweep(trials: Any, words: str) -> None:
    with pytest.raises(jl.ConfigError, match=words):
        check_trials(trials)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"epochs": 0}, "epochs of at least 1"),
        ({"batch_size": 2.0}, "batch_size of at least 1, an integer; got 2.0"),
        ({"slots": 0}, "slots"),
        ({"order": "mine"}, "order to be 'same' or 'own', got 'mine'"),
        ({"mode": "maximum"}, "mode to be 'max' or 'min'"),
        ({"pad": 0.5}, "pad to be a multiple of at least 1"),
        ({"pad": float("nan")}, "pad"),
        ({"halving": Halving((1, 3))}, "before the last of 3 epochs"),
    ],
)
def test_settings_that_mean_nothing(values: Any, words: str) -> None:
    with pytest.raises(jl.ConfigError, match=words):
        Settings(**{"epochs": 3, "batch_size": 8, **values})


@pytest.mark.parametrize(
    "values", [{"epochs": ()}, {"epochs": (2, 1)}, {"epochs": (0,)}, {"epochs": (1,), "keep": 1.0}]
)
def test_halvings_that_mean_nothing(values: Any) -> None:
    with pytest.raises(jl.ConfigError, match="expected"):
        Halving(**values)


def test_rungs_are_the_spans_between() -> None:
    assert Settings(epochs=5, batch_size=1).rungs == ((0, 5),)
    halving = Halving((1, 3))
    assert Settings(epochs=5, batch_size=1, halving=halving).rungs == ((0, 1), (1, 3), (3, 5))
