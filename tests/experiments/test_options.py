"""The options' ranges, and the preset they default to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.experiments.article import Pretrain, Reproduce
from jax_lora.experiments.options import LoraOptions, TrainOptions, changes, describe


def test_defaults_are_the_articles() -> None:
    options = Reproduce()
    expected = {
        "epochs": 5,
        "batch_size": 32,
        "learning_rate": 0.001,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "hidden_dim": 128,
        "num_hidden": 2,
        "rank": 32,
        "alpha": 1.0,
        "init": "article",
    }
    assert {name: getattr(options, name) for name in expected} == expected
    assert options.lora_config().scale == 1.0  # alpha, and not alpha / rank


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("epochs", -1),
        ("batch_size", 0),
        ("seed", -1),
        ("seed", 2**32),
        ("learning_rate", -0.1),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("momentum", 1.1),
        ("momentum", -0.1),
        ("momentum", math.nan),
        ("weight_decay", -1.0),
        ("weight_decay", math.nan),
        ("num_devices", 0),
        ("hidden_dim", 0),
        ("num_hidden", 0),
        ("save_every_steps", 0),
        ("save_every_minutes", -1.0),
        ("keep", 0),
    ],
)
def test_out_of_range(name: str, value: Any) -> None:
    option = "--" + name.replace("_", "-")
    with pytest.raises(
        jl.ConfigError, match=rf"^expected {option} (from|of at least) .*, got {value}$"
    ):
        Pretrain(**{name: value})


def test_all_mistakes_are_named_together() -> None:
    with pytest.raises(
        jl.ConfigError, match=r"--epochs of at least 1, got 0; --batch-size .*, got -3"
    ):
        Pretrain(epochs=0, batch_size=-3)


def test_options_of_checkpoints_that_would_do_nothing() -> None:
    with pytest.raises(jl.ConfigError, match=r"--resume with --keep, --keep-best, got none of"):
        Pretrain(keep=3, keep_best="loss")
    with pytest.raises(jl.ConfigError, match="expected --resume with --fall-back, got none"):
        Pretrain(save_every_steps=3, fall_back=True)
    saving = [Pretrain(**{n: 1}).saves for n in ("save_every_steps", "save_every_minutes")]
    assert (saving, Pretrain(resume=True).saves, Pretrain().saves) == ([True] * 2, True, False)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf])
def test_alpha_is_finite(alpha: float) -> None:
    with pytest.raises(jl.ConfigError, match="expected alpha to be a finite number"):
        LoraOptions(alpha=alpha).lora_config()


def test_changes_are_what_departs_from_the_preset() -> None:
    assert changes(Reproduce()) == {}
    changed = Reproduce(rank=4, out=Path("x"), targets=("**/l1/*",))
    assert changes(changed) == {
        "rank": [32, 4],
        "out": [None, "x"],
        "targets": [["**/kernel"], ["**/l1/*"]],
    }
    assert describe(changed)["out"] == "x"


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_optimizer_is_torchs_sgd(momentum: float, weight_decay: float) -> None:
    """``v = momentum v + (g + decay w); w = w - rate v``."""
    options = TrainOptions(learning_rate=0.01, momentum=momentum, weight_decay=weight_decay)
    optimizer = options.optimizer()
    weight, velocity = 2.0, 0.0
    state = optimizer.init(jnp.float32(weight))
    for gradient in (1.0, -3.0, 0.5):
        found, state = optimizer.update(jnp.float32(gradient), state, jnp.float32(weight))
        velocity = momentum * velocity + gradient + weight_decay * weight
        np.testing.assert_allclose(found, -0.01 * velocity, rtol=1e-6)
        weight -= 0.01 * velocity
