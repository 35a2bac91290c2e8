"""Regular expressions from files: those of people are run, those that take for ever are not."""

from __future__ import annotations

from typing import Any

import pytest

from jax_lora.errors import CheckpointError
from jax_lora.peft import config as configs
from jax_lora.peft import patterns
from jax_lora.peft.config import PeftConfig
from jax_lora.peft.patterns import Expressions, pattern_problem


@pytest.mark.parametrize(
    "pattern",
    [
        r".*layers\.(0|1)\.self_attn\.(q|k|v)_proj",
        r"^(?!.*vision).*(?:q_proj|k_proj)$",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\."
        r"[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))",
        r"model\.layers\.\d+\.mlp\.(up|down)_proj",
        "q_proj",
        "(" + "|".join(rf"model\.layers\.{k}\.self_attn\.q_proj" for k in range(200)) + ")",
    ],
)
def test_patterns_that_people_write_are_run(pattern: str) -> None:
    assert pattern_problem(pattern) == ""


@pytest.mark.parametrize(
    "pattern",
    [r"(a+)+$", r"(a|a)*$", r"((ab)*c?)+", r"(.*){9}x", r".*.*.*.*.*.*.*", "[", "a" * 9000 + "*"],
)
def test_patterns_that_can_take_for_ever_are_not(pattern: str) -> None:
    assert pattern_problem(pattern)


def _config(**fields: Any) -> PeftConfig:
    data = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"]}
    return PeftConfig.from_json("here", data | fields)


def test_another_python_reads_it_otherwise() -> None:
    """What gives a warning when it is compiled is refused, and gives none."""
    assert "no regular expression (Possible nested set" in pattern_problem("[[a]x*")


def test_many_long_expressions_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds for each megabyte; names are no expressions, and a model has thousands."""
    monkeypatch.setattr(configs, "_MAX_LETTERS", 20_000)
    letters = "(a|b)" * 1_000
    with pytest.raises(CheckpointError, match="more than 20,000 letters of regular expressions"):
        _config(rank_pattern={f"{letters}{k}": 1 for k in range(9)})
    names = {f"model.layers.{k}.mlp.experts.{k}.up_proj": 2 for k in range(2_000)}
    config = _config(rank_pattern=names)
    assert config.rank_of("model.layers.7.mlp.experts.7.up_proj") == 2
    assert config.rank_of("model.layers.7.mlp.experts.8.up_proj") == 1


@pytest.mark.parametrize("field", ["target_modules", "rank_pattern", "modules_to_save"])
def test_what_is_slow_for_each_of_many_modules_ends(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty milliseconds for each of a thousand modules, without the limit."""
    monkeypatch.setattr(patterns, "_MAX_SECONDS", 0.3)
    slow = ".*.*.*.*.*#"
    value: Any = {"rank_pattern": {slow: 2}, "modules_to_save": [slow]}.get(field, slow)
    config = _config(**{field: value})
    modules = [
        f"model.layers.{k}.self_attn.some_rather_long_module_name.q_proj" for k in range(999)
    ]

    def ask() -> None:
        for module in modules:
            config.is_target(module)
            config.rank_of(module)

    with pytest.raises(CheckpointError, match="took more than 0 seconds; expected such as name"):
        ask()
    # The control: what people write is far from the limit.
    config = _config(target_modules=r".*\.layers\.\d+\..*(q|k)_proj")
    ask()


def test_the_first_that_matches() -> None:
    found = Expressions()
    many = [f"x{k}$" for k in range(200)]
    assert [found.first(many, name) for name in ("x0", "x63", "x64", "x199", "y")] == [
        *(0, 63, 64, 199, None)
    ]
