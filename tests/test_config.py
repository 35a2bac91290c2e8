"""A configuration is checked when it is made, and survives JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("rank", 0, "a rank of at least 1"),
        ("rank", -3, "a rank of at least 1"),
        ("rank", 8.0, "a rank of at least 1"),
        ("rank", "8", "a rank of at least 1"),
        ("rank", True, "a rank of at least 1"),
        ("alpha", math.inf, "alpha to be a finite number"),
        ("alpha", -math.inf, "alpha to be a finite number"),
        ("alpha", math.nan, "alpha to be a finite number"),
        ("alpha", "16", "alpha to be a finite number"),
        ("alpha", None, "alpha to be a finite number"),
        ("alpha", True, "alpha to be a finite number"),
        ("scaling", "rs-lora", "scaling to be one of standard, rslora, alpha"),
        ("scaling", None, "scaling to be one of standard, rslora, alpha"),
        ("init", "kaimin", "init to be one of kaiming, gaussian, article"),
        ("init", 3, "init to be one of kaiming, gaussian, article"),
        ("variant", "loar", "variant to be one of lora, lora-fa, dora, vera, loha, lokr, full"),
        ("variant", "rows", "variant to be one of lora, lora-fa, dora, vera, loha, lokr, full"),
        ("mode", "atuo", "mode to be one of factored, materialize, auto"),
        ("dropout", 1.0, "dropout to be a probability in [0, 1)"),
        ("dropout", -0.1, "dropout to be a probability in [0, 1)"),
        ("dropout", math.nan, "dropout to be a probability in [0, 1)"),
        ("dropout", True, "dropout to be a probability in [0, 1)"),
        ("dtype", "int8", "a floating-point dtype"),
        ("dtype", "float23", "a floating-point dtype"),
        ("targets", ("**/kernel", ""), "targets to be globs"),
        ("targets", (3,), "targets to be globs"),
        ("targets", 3, "targets to be globs"),
        ("targets", "", "targets to be globs"),
        ("targets", "re:(", "a pattern over parameter paths"),
        ("targets", "re:", "a pattern over parameter paths"),
        ("targets", "{layer}/{layer}", "a pattern over parameter paths"),
        ("exclude", "re:[", "a pattern over parameter paths"),
        ("exclude", None, "exclude to be globs"),
        ("exclude", ("",), "exclude to be globs"),
    ],
)
def test_a_bad_value_is_refused_with_what_was_expected(
    field: str, value: Any, expected: str
) -> None:
    with pytest.raises(jl.ConfigError) as error:
        jl.LoraConfig(**{field: value})
    assert f"expected {expected}" in str(error.value)
    assert repr(value) in str(error.value)


def test_no_target_is_refused() -> None:
    with pytest.raises(jl.ConfigError, match="expected at least one target, got none"):
        jl.LoraConfig(targets=())


def test_all_bad_values_are_named_in_one_error() -> None:
    with pytest.raises(jl.ConfigError) as error:
        jl.LoraConfig(
            rank=0,
            alpha=math.nan,
            scaling="rs",  # type: ignore[arg-type]
            init="zeros",  # type: ignore[arg-type]
            dtype="int8",
            targets=("re:(",),
            exclude=(3,),  # type: ignore[arg-type]
        )
    text = str(error.value)
    assert [line.count("expected") for line in text.splitlines()] == [1] * 7
    for named in ("rank=0", "alpha=nan", "'rs'", "'zeros'", "'int8'", "'re:('", "(3,)"):
        assert named in text


def test_a_misspelt_choice_names_the_nearest() -> None:
    with pytest.raises(jl.ConfigError, match="nearest: 'rslora'"):
        jl.LoraConfig(scaling="rs-lora")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scaling", "scale"), [("standard", 24 / 16), ("rslora", 24 / 4), ("alpha", 24.0)]
)
def test_scale(scaling: Any, scale: float) -> None:
    assert jl.LoraConfig(rank=16, alpha=24.0, scaling=scaling).scale == scale


def test_one_glob_needs_no_tuple() -> None:
    assert jl.LoraConfig(targets="**/kernel", exclude="head/*").targets == ("**/kernel",)
    assert jl.LoraConfig(exclude="head/*").exclude == ("head/*",)  # type: ignore[arg-type]
    assert jl.LoraConfig(targets=["a", "b"]).targets == ("a", "b")  # type: ignore[arg-type]


def test_targets_as_rules() -> None:
    rule = jl.Rule("head/*", rank=2)
    assert jl.LoraConfig(targets=rule).targets == (rule,)
    assert jl.LoraConfig(targets=("**/q", rule)).rules == (jl.Rule("**/q"), rule)


def test_it_is_frozen_and_hashable() -> None:
    config = jl.LoraConfig(rank=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 4  # type: ignore[misc]
    assert {config: 1}[jl.LoraConfig(rank=3)] == 1


def test_json_round_trip() -> None:
    config = jl.LoraConfig(
        rank=3,
        alpha=-0.25,
        targets=("enc/**", "dec/*/kernel"),
        exclude=("**/head/*",),
        scaling="rslora",
        init="gaussian",
        dtype="bfloat16",
        variant="dora",
        dropout=0.25,
        mode="auto",
    )
    # Every field differs from its default, so that none can be forgotten unseen.
    for field in dataclasses.fields(config):
        assert getattr(config, field.name) != getattr(jl.LoraConfig(), field.name)
    data = config.to_json()
    assert set(data) == {field.name for field in dataclasses.fields(config)}
    assert jl.LoraConfig.from_json(json.loads(json.dumps(data))) == config
    assert jl.LoraConfig.from_json({}) == jl.LoraConfig()


def test_json_of_a_config_without_rules_is_what_it_was() -> None:
    """What released checkpoints hold; later fields have their defaults."""
    golden = {
        "rank": 2,
        "alpha": 0.1,
        "targets": ["**/kernel"],
        "exclude": ["x/**"],
        "scaling": "standard",
        "init": "article",
        "dtype": "float32",
    }
    config = jl.LoraConfig(rank=2, alpha=0.1, targets="**/kernel", exclude="x/**", init="article")  # type: ignore[arg-type]
    assert config.to_json() == golden | {"variant": "lora", "dropout": 0.0, "mode": "factored"}
    assert jl.LoraConfig.from_json(golden) == config


def test_json_of_a_config_with_rules() -> None:
    config = jl.LoraConfig(
        targets=(
            jl.Rule("**/q/kernel", layers=range(3), rank=16, alpha=32.0, scaling="rslora"),
            jl.Rule("re:.*/v", init="gaussian", dtype="bfloat16"),
            "**/up",
            jl.Rule("all-linear", rank=2),
        ),
        exclude=("re:head.*",),
    )
    golden = [
        {
            "match": "**/q/kernel",
            "layers": [0, 1, 2],
            "rank": 16,
            "alpha": 32.0,
            "scaling": "rslora",
        },
        {"match": "re:.*/v", "init": "gaussian", "dtype": "bfloat16"},
        "**/up",
        {"match": "all-linear", "rank": 2},
    ]
    data = json.loads(json.dumps(config.to_json()))
    assert data["targets"] == golden
    assert jl.LoraConfig.from_json(data) == config


def test_unknown_fields_are_named() -> None:
    with pytest.raises(jl.ConfigError, match=r"expected the fields alpha, .*; got also r, lr"):
        jl.LoraConfig.from_json({"r": 8, "rank": 8, "lr": 0.1})
    with pytest.raises(jl.ConfigError, match="rank of at least 1"):
        jl.LoraConfig.from_json({"rank": 0})
    with pytest.raises(jl.ConfigError, match=r"expected the fields alpha, .*; got also drop"):
        jl.LoraConfig.from_json({"targets": [{"match": "**", "drop": 0.1}]})
    with pytest.raises(jl.ConfigError, match=r"expected match to be a glob.* got match=None"):
        jl.LoraConfig.from_json({"targets": [{"rank": 2}]})
    with pytest.raises(jl.ConfigError, match="targets to be globs"):
        jl.LoraConfig.from_json({"targets": [3]})


def test_numbers_of_other_libraries_are_numbers() -> None:
    config = jl.LoraConfig(rank=np.int64(4), alpha=np.float32(8), dtype=jnp.bfloat16)
    assert (config.rank, config.alpha, config.dtype) == (4, 8.0, "bfloat16")
    assert jl.LoraConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("alpha", [1e39, -1e39, 10**400])
def test_an_alpha_that_overflows_is_refused(alpha: float) -> None:
    with pytest.raises(jl.ConfigError, match="that float32 can hold"):
        jl.LoraConfig(alpha=alpha)


def test_json_that_is_no_object_is_refused() -> None:
    with pytest.raises(
        jl.ConfigError, match=r"expected a JSON object with named fields, got \[1\]"
    ):
        jl.LoraConfig.from_json([1])
