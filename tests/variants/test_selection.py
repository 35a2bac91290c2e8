"""Variants in rules and plans: what is refused, and what the table says."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.variants import VARIANTS


def _model(p: Any, ids: Any) -> Any:
    x = p["table"][ids] * p["norm"]
    x = jnp.tanh(x @ p["w"] + p["bias"])
    return x @ p["head"] + p["table"][ids] @ p["square"]


@pytest.fixture(scope="module")
def params() -> Any:
    rng = np.random.default_rng(0)
    shapes = {
        "table": (11, 6),
        "norm": (6,),
        "w": (6, 4),
        "bias": (4,),
        "head": (4, 5),
        "square": (6, 5),
        "unused": (3,),
    }
    tree = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}
    return tree | {"steps": jnp.int32(3)}


def _plan(params: Any, *targets: Any, **settings: Any) -> jl.Plan:
    config = jl.LoraConfig(**{"rank": 2, "targets": targets or "all-linear"} | settings)
    return jl.plan(_model, params, jnp.arange(3), config=config)


def test_the_table_of_a_plan_of_many_kinds(params: Any) -> None:
    plan = _plan(
        params,
        jl.Rule("table", rows=(8, 9, 10)),
        jl.Rule("bias", variant="full"),
        jl.Rule("norm", variant="full"),
        jl.Rule("head", variant="dora", init="pissa", dropout=0.1),
        jl.Rule("square", variant="lokr", rank=3, alpha=3.0),
        "w",
        alpha=4.0,
    )
    # Trained: head 4*2 + 2*5 + 5; square, as 6 = 2*3 and 5 = 1*5, c 2*1, a 3*3, b 3*5; table 3*6.
    # Multiply-adds of 3 tokens: head with its start 3 * 4*(4 + 5) and 4 * 4*5 for the norms, square
    # 3 * 3*(6 + 5), w 3 * 2*(6 + 4). Bytes: of all that is trained, the start of head and its norms
    # (4*2 + 2*5 + 5), and three scales.
    want = """
        LoRA plan: float32
        adapted  shape    variant  rank  scale  a        dropout  rule    trained  multiply-adds  note
        bias     [4]      full                           0        bias          4              0
        head     [4, 5]   dora     2     2      pissa    0.1      head         23            188
        norm     [6]      full                           0        norm          6              0
        square   [6, 5]   lokr     3     1               0        square       26             99
        table    [11, 6]  rows                           0        table        18              0
        w        [6, 4]   lora     2     2      kaiming  0        w            20             60
        trained 97 beside 154 frozen parameters (63.0%), 492 bytes
        forward 252 multiply-adds + 347 (137.7%)

        not adapted  because
        steps        the function never uses it
        unused       the function never uses it
    """  # noqa: E501
    assert str(plan) == inspect.cleandoc(want)


@pytest.mark.parametrize("variant", [*VARIANTS, "pissa", "olora", "all kinds"])
def test_a_plan_counts_what_the_adapter_has(variant: str, params: Any) -> None:
    if variant == "rows":
        plan = _plan(params, jl.Rule("table", rows=(8, 9)))
    elif variant in ("pissa", "olora"):
        plan = _plan(params, init=variant, dtype="bfloat16")
    elif variant == "all kinds":
        rules = [jl.Rule("table", rows=(8, 9)), jl.Rule("bias", variant="full")]
        rules += [jl.Rule("w", variant="vera"), jl.Rule("head", variant="loha")]
        plan = _plan(params, *rules, jl.Rule("square", variant="dora", rank=4))
    else:
        plan = _plan(params, variant=variant)
    adapter = jl.init(jax.random.key(0), params, plan)
    assert plan.adapter_bytes == adapter.nbytes
    assert plan.trainable_params == adapter.trainable_params
    for path, entry in adapter.items():
        sizes = {name: x.size for name, x in entry.trained().items()}
        assert plan.trainable(path) == sum(sizes.values())
        assert plan.targets[path].entry is type(entry)
        assert entry.problems() == []
    rows = jl.summary(_model, params, jnp.arange(3), adapter=adapter).rows
    added = {row.name.split()[2].rstrip(","): row for row in rows if row.name.startswith("  +")}
    assert set(added) == set(adapter)
    for path, row in added.items():
        assert row.params == plan.trainable(path)
        assert row.multiply_adds == plan.extra_multiply_adds(path)


class TestRefusals:
    def refused(self, params: Any, *rules: Any, match: str, **settings: Any) -> None:
        with pytest.raises(jl.JaxLoraError, match=match) as caught:
            _plan(params, *rules, **settings)
        assert isinstance(caught.value, (jl.ConfigError, jl.TargetError))

    def test_an_unknown_variant(self, params: Any) -> None:
        self.refused(params, variant="dorra", match=r"variant to be one of .*nearest: 'dora'")

    @pytest.mark.parametrize("variant", ["vera", "loha", "lokr", "full"])
    def test_a_start_that_is_not_of_the_variant(self, variant: str, params: Any) -> None:
        expected = f"init for variant '{variant}' to be none.*got 'pissa'"
        self.refused(params, "w", variant=variant, init="pissa", match=expected)
        self.refused(params, jl.Rule("w", variant=variant, init="pissa"), match=expected)
        self.refused(params, jl.Rule("w", init="pissa"), variant=variant, match=expected)
        # The start of the other targets is not for the variant of this rule.
        plan = _plan(params, jl.Rule("w", variant=variant), "head", init="pissa")
        assert (plan.targets["w"].init, plan.targets["head"].init) == ("", "pissa")

    @pytest.mark.parametrize("alpha", [-1.0, 0.0])
    @pytest.mark.parametrize("variant", ["lora", "lora-fa", "dora"])
    def test_pissa_without_a_positive_strength(
        self, variant: str, alpha: float, params: Any
    ) -> None:
        match = f"positive alpha with init 'pissa', .* got alpha={alpha}"
        self.refused(params, "w", variant=variant, init="pissa", alpha=alpha, match=match)
        _plan(params, "w", variant=variant, alpha=alpha)

    def test_rows_and_a_variant(self, params: Any) -> None:
        with pytest.raises(jl.ConfigError, match="expected rows or a variant, got both"):
            jl.Rule("table", rows=(1,), variant="lora")

    @pytest.mark.parametrize("rows", [(), (-1,), (1.5,), "12", (True,)])
    def test_what_are_no_rows(self, rows: Any) -> None:
        with pytest.raises(jl.ConfigError, match="expected rows to be numbers from 0"):
            jl.Rule("table", rows=rows)

    def test_rows_that_there_are_not(self, params: Any) -> None:
        rule = jl.Rule("table", rows=(3, 11, 12, 13))
        self.refused(params, rule, match=r"table: .*it has 11 rows, and none of 11-13")

    def test_rows_of_what_is_never_looked_up(self, params: Any) -> None:
        for path in ("w", "head"):
            rule = jl.Rule(path, rows=(1,))
            self.refused(params, rule, match=f"{path}: .*never looks up its rows")
        self.refused(params, jl.Rule("bias", rows=(1,)), match="bias: .*not as a matrix")

    def test_rows_along_more_than_one_axis(self) -> None:
        base = {"w": jnp.ones((4, 5, 6))}
        config = jl.LoraConfig(targets=jl.Rule("w", rows=(1,)))
        with pytest.raises(jl.TargetError, match=r"w: .*it has no rows: its in-axes are \(0, 1\)"):
            jl.plan(lambda p, i: p["w"][i, i], base, jnp.arange(3), config=config)

    @pytest.mark.parametrize("how", [{"variant": "full"}, {"rows": (1,)}])
    @pytest.mark.parametrize("more", [{"dropout": 0.1}, {"rank": 2}, {"alpha": 1.0}])
    def test_strength_or_dropout_of_what_is_trained_whole(
        self, how: Any, more: Any, params: Any
    ) -> None:
        (name,) = more
        rule = jl.Rule("table", **how, **more)
        self.refused(params, rule, match=f"expected no {name} for what is trained whole")
        # A configuration's are for its other targets.
        plan = _plan(params, jl.Rule("table", **how), "w", **{"rank": 2} | more)
        assert (plan.targets["table"].dropout, plan.targets["table"].rank) == (0, 0)

    def test_full_training_of_what_is_never_used_or_no_float(self, params: Any) -> None:
        rule = jl.Rule("unused", variant="full")
        self.refused(params, rule, "w", match="unused: .*the function never uses it")
        used = params | {"steps": jnp.int32(3)}
        config = jl.LoraConfig(rank=2, targets=(jl.Rule("steps", variant="full"), "w"))
        with pytest.raises(jl.TargetError, match=r"steps: .*its dtype is int32"):
            jl.plan(
                lambda p, ids: (_model(p, ids), p["steps"] * ids),
                used,
                jnp.arange(3),
                config=config,
            )

    @pytest.mark.parametrize("dropout", [-0.1, 1.0, True, "0.1", float("nan")])
    def test_dropout_that_is_no_probability(self, dropout: Any) -> None:
        with pytest.raises(jl.ConfigError, match=r"probability in \[0, 1\)"):
            jl.LoraConfig(dropout=dropout)
        with pytest.raises(jl.ConfigError, match=r"probability in \[0, 1\)"):
            jl.Rule("w", dropout=dropout)

    def test_a_rank_that_only_repeats_itself(self, params: Any) -> None:
        for variant, limited in (("dora", True), ("lora-fa", True), ("vera", False)):
            if limited:
                self.refused(params, "w", variant=variant, rank=5, match="rank of at most 4")
            else:
                assert _plan(params, "w", variant=variant, rank=5).targets["w"].rank == 5


class TestChoices:
    def test_predicates_are_asked_about_all_parameters_that_can_be_trained_whole(
        self, params: Any
    ) -> None:
        asked = []

        def vectors(path: str, shape: Any, uses: Any) -> bool:
            asked.append(path)
            return len(shape) == 1

        plan = _plan(params, jl.Rule(vectors, variant="full"), "all-linear")
        assert {p: t.variant for p, t in plan.targets.items()} == {
            "bias": "full",
            "norm": "full",
            "w": "lora",
            "head": "lora",
            "square": "lora",
        }
        assert set(asked) == set(params) - {"unused", "steps"}
        assert "vectors" in plan.targets["bias"].rule

    def test_all_linear_trained_whole(self, params: Any) -> None:
        plan = _plan(params, jl.Rule("all-linear", variant="full"))
        assert set(plan.targets) == {"w", "head", "square"}
        assert plan.trainable_params == 24 + 20 + 30
        assert plan.extra_multiply_adds("w") == 0

    def test_an_exclusion_and_an_earlier_rule_come_first(self, params: Any) -> None:
        plan = _plan(params, jl.Rule("*", variant="full"), exclude=("unused", "steps", "w"))
        assert set(plan.targets) == {"table", "norm", "bias", "head", "square"}
        assert plan.skipped["w"] == "excluded by w"
        plan = _plan(params, "w", jl.Rule("re:w|bias", variant="full"))
        assert {p: t.variant for p, t in plan.targets.items()} == {"w": "lora", "bias": "full"}

    def test_a_rule_s_variant_is_its_own(self, params: Any) -> None:
        plan = _plan(params, jl.Rule("w", variant="lora"), "head", variant="dora")
        assert {p: t.variant for p, t in plan.targets.items()} == {"w": "lora", "head": "dora"}

    def test_rows_of_a_configuration_with_another_variant(self, params: Any) -> None:
        plan = _plan(params, jl.Rule("table", rows=range(8, 11)), "w", variant="dora")
        assert (plan.targets["table"].variant, plan.targets["table"].rows) == ("rows", (8, 9, 10))

    def test_it_survives_json(self, params: Any) -> None:
        config = jl.LoraConfig(
            targets=(jl.Rule("table", rows=range(8, 11)), jl.Rule("w", variant="full")),
            variant="lokr",
            dropout=0.25,
        )
        assert jl.LoraConfig.from_json(config.to_json()) == config
