"""Slips that are easily made, each with one clear error or a word in the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import jax_lora as jl


def _model(p: Any, ids: Any) -> Any:
    return jnp.tanh(p["table"][ids] @ p["w"] + p["b"])


@pytest.fixture
def params() -> Any:
    return {"table": jnp.ones((7, 4)), "w": jnp.ones((4, 3)), "b": jnp.ones(3)}


def _plan(params: Any, *targets: Any) -> jl.Plan:
    return jl.plan(_model, params, jnp.arange(3), config=jl.LoraConfig(rank=2, targets=targets))


def test_a_mode_of_what_is_trained_whole_is_refused(params: Any) -> None:
    with pytest.raises(jl.ConfigError, match="expected no mode for what is trained whole"):
        _plan(params, jl.Rule("b", variant="full", mode="materialize"))
    with pytest.raises(jl.ConfigError, match="expected no mode for what is trained whole"):
        _plan(params, jl.Rule("table", rows=(1,), mode="auto"))


def test_the_plan_says_where_dropout_has_nothing_to_drop(params: Any) -> None:
    plan = _plan(params, jl.Rule("table", dropout=0.5), jl.Rule("w", dropout=0.5))
    rows = {line.split()[0]: line for line in plan.table(full=True).splitlines() if line}
    assert "no dropout: its rows are looked up" in rows["table"]
    assert "no dropout" not in rows["w"]
    adapter = jax.tree.map(lambda x: x + jnp.ones_like(x), jl.init(jax.random.key(0), params, plan))
    alone = jl.dropout(jl.select(adapter, "table"), jax.random.key(1), 0.5)
    ids = jnp.arange(3)
    want = jl.apply(_model)(params, jl.select(adapter, "table"), ids)
    assert bool((jl.apply(_model)(params, alone, ids) == want).all())


def test_dropout_on_a_weight_that_a_mode_forms_names_the_mode(params: Any) -> None:
    plan = _plan(params, "w")
    adapter = jl.dropout(jl.init(jax.random.key(0), params, plan), jax.random.key(1), 0.5)
    with pytest.raises(jl.MaterializeError, match="dropout 0 or the mode 'factored'"):
        jl.apply(_model, mode="materialize")(params, adapter, jnp.arange(3))


def test_a_plan_stands_for_its_layouts_and_not_for_its_configuration(
    params: Any, tmp_path: Path
) -> None:
    plan = _plan(params, "w")
    tuned = params | {"w": params["w"] + jnp.ones((4, 3))}
    adapter, errors = jl.extract(params, tuned, plan, rank=1)
    assert list(adapter) == ["w"]
    assert float(errors["w"]) < 1e-6
    with pytest.raises(jl.JaxLoraError, match=r"such as plan\.config .*, got Plan"):
        jl.io.save_adapter(tmp_path / "a", adapter, plan)  # type: ignore[arg-type]
    assert not (tmp_path / "a").exists()


def test_an_optimizer_is_a_transformation_and_lora_plus_makes_two() -> None:
    with pytest.raises(jl.ConfigError, match=r"such as optax\.adam\(1e-3\), got float"):
        jl.optim.lora_optimizer(1e-3)  # type: ignore[arg-type]
    with pytest.raises(jl.ConfigError, match=r"such as optax\.adam, got GradientTransformation"):
        jl.optim.lora_plus(optax.adam(1e-3), 1e-3)  # type: ignore[arg-type]
