"""The plan accounts for every parameter and rule before anything runs; init follows it."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_lora as jl
from jax_lora.adapter import param_key

PLAN = """\
LoRA plan: rank 3, scale 2, float32, a kaiming, b zero
adapted        shape    rule          trained  multiply-adds  note
enc/l1/kernel  [12, 8]  enc/*/kernel       60            300
enc/l2/kernel  [8, 8]   enc/*/kernel       48            240
head/kernel    [8, 2]   head/kernel        30            150  rank exceeds min(in, out) = 2
trained 138 beside 210 frozen parameters (65.7%), 564 bytes
forward 970 multiply-adds + 690 (71.1%)

not adapted         because
enc/l{1,2}/bias x2  excluded by enc/*/bias
head/bias           used by add, not as a matrix
spare/kernel        the function never uses it"""


def _shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def _params(**more: Any) -> dict[str, Any]:
    return {
        "enc": {
            "l1": {"kernel": _shape(12, 8), "bias": _shape(8)},
            "l2": {"kernel": _shape(8, 8), "bias": _shape(8)},
        },
        "head": {"kernel": _shape(8, 2), "bias": _shape(2)},
        "spare": {"kernel": _shape(4, 4)},
        **more,
    }


def _model(params: Any, x: Any) -> Any:
    for layer in (params["enc"]["l1"], params["enc"]["l2"]):
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def _plan(params: Any = None, **config: Any) -> jl.Plan:
    config = {"rank": 3, "alpha": 6.0, **config}
    return jl.plan(_model, params or _params(), _shape(5, 12), config=jl.LoraConfig(**config))


def test_the_printed_plan() -> None:
    plan = _plan(targets=("enc/*/kernel", "head/kernel"), exclude=("enc/*/bias",))
    assert str(plan) == PLAN


def test_the_numbers_of_the_plan_in_closed_form() -> None:
    plan = _plan()
    rank, rows = 3, 5
    fans = {"enc/l1/kernel": (12, 8), "enc/l2/kernel": (8, 8), "head/kernel": (8, 2)}
    assert list(plan.targets) == list(fans)
    for path, (n, m) in fans.items():
        assert plan.targets[path].layout == jl.Layout((n, m), (0,), (1,))
        assert plan.trainable(path) == rank * (n + m)
        assert plan.extra_multiply_adds(path) == rows * rank * (n + m)
    assert plan.trainable_params == 138
    assert plan.base_params == 12 * 8 + 8 + 8 * 8 + 8 + 8 * 2 + 2 + 4 * 4
    assert plan.multiply_adds == rows * (12 * 8 + 8 + 8 * 8 + 8 + 8 * 2 + 2)
    assert plan.adapter_bytes == 4 * 138 + 4 * 3
    assert _plan(dtype="bfloat16").adapter_bytes == 2 * 138 + 4 * 3


def test_all_linear_takes_every_product_and_says_why_the_rest_is_left() -> None:
    plan = _plan()
    assert {target.rule for target in plan.targets.values()} == {"all-linear"}
    assert plan.skipped == {
        "enc/l1/bias": "used by add, not as a matrix",
        "enc/l2/bias": "used by add, not as a matrix",
        "head/bias": "used by add, not as a matrix",
        "spare/kernel": "the function never uses it",
    }


def test_every_parameter_is_a_target_or_has_a_reason() -> None:
    for config in ({}, {"targets": "enc/l2/kernel"}, {"exclude": ("enc/l1/*",)}):
        plan = _plan(**config)
        paths = {
            jax.tree_util.keystr(p, simple=True, separator="/")
            for p, _ in jax.tree_util.tree_leaves_with_path(_params())
        }
        assert set(plan.targets) | set(plan.skipped) == paths
        assert not set(plan.targets) & set(plan.skipped)
        assert all(plan.skipped.values())


def test_the_first_rule_that_matches_wins() -> None:
    plan = _plan(targets=("enc/l1/*", "**/kernel"), exclude=("**/bias", "spare/*"))
    assert {path: target.rule for path, target in plan.targets.items()} == {
        "enc/l1/kernel": "enc/l1/*",
        "enc/l2/kernel": "**/kernel",
        "head/kernel": "**/kernel",
    }
    assert plan.skipped["spare/kernel"] == "excluded by spare/*"
    plan = _plan(targets=("head/kernel", "all-linear"))
    assert plan.targets["head/kernel"].rule == "head/kernel"
    assert plan.targets["enc/l1/kernel"].rule == "all-linear"
    assert _plan(targets="head/kernel", rank=2).skipped["enc/l1/kernel"] == "no target matches it"


def test_all_problems_are_named_in_one_error() -> None:
    with pytest.raises(jl.TargetError) as error:
        _plan(targets=("enc/l1/kernal", "head/*", "**/kernel"), exclude=("decoder/**",))
    text = str(error.value)
    assert "targets[0] 'enc/l1/kernal' matches no parameter (nearest: 'enc/l1/kernel'" in text
    assert "exclude[0] 'decoder/**' matches no parameter (known: 'enc/l1/bias'" in text
    assert "head/bias: matched by 'head/*' but used by add, not as a matrix" in text
    assert "spare/kernel: matched by '**/kernel' but the function never uses it" in text
    assert len(text.splitlines()) == 5
    # Each of them corrected, nothing is left to complain about.
    _plan(targets=("enc/l1/kernel", "head/*", "**/kernel"), exclude=("**/bias", "spare/**"))


def test_an_adaptable_parameter_of_another_dtype_says_so() -> None:
    def model(params: Any, x: Any) -> Any:
        return x @ params["codes"].astype(jnp.float32) @ params["w"]

    params = {"codes": _shape(6, 6, dtype=jnp.int8), "w": _shape(6, 4)}
    plan = jl.plan(model, params, _shape(5, 6), config=jl.LoraConfig(rank=2))
    assert plan.skipped == {"codes": "its dtype is int8, not floating-point"}
    config = jl.LoraConfig(rank=2, targets="codes")
    with pytest.raises(jl.TargetError, match="codes: matched by 'codes' but its dtype is int8"):
        jl.plan(model, params, _shape(5, 6), config=config)


def test_nothing_left_to_adapt_is_an_error_that_lists_the_reasons() -> None:
    with pytest.raises(jl.TargetError, match=r"decides nothing(.|\n)*head/kernel' is excluded by"):
        _plan(exclude=("**/kernel",))
    with pytest.raises(jl.TargetError) as error:
        jl.plan(lambda params, x: x + params["b"], {"b": _shape(4), "c": _shape(4)}, _shape(4))
    assert "'all-linear' matches none of the 0 parameters that can be adapted" in str(error.value)
    assert "b: used by add, not as a matrix" in str(error.value)
    assert "c: the function never uses it" in str(error.value)
    with pytest.raises(jl.TargetError, match="the first argument has no arrays in it"):
        jl.plan(lambda params, x: x, {}, _shape(4))


def test_rank() -> None:
    # Above what any target can use: an error. Above what one of them can use: a note.
    with pytest.raises(jl.ConfigError, match=r"rank of at most 8, .* got rank=9"):
        _plan(rank=9)
    lines = {line.split()[0]: line for line in str(_plan(rank=8)).splitlines() if line}
    assert "rank exceeds min(in, out) = 2" in lines["head/kernel"]
    assert "rank exceeds" not in lines["enc/l2/kernel"]
    assert "rank exceeds" not in str(_plan(rank=2))
    with pytest.raises(jl.ConfigError, match="rank of at most 2"):
        _plan(targets="head/kernel", rank=3)


def test_places_where_a_weight_is_formed_are_noted() -> None:
    def model(params: Any, x: Any) -> Any:
        penalty = jnp.sin(params["w"]).sum() + jnp.cos(params["w"]).sum()
        return x @ params["w"] @ params["v"] + penalty

    params = {"w": _shape(6, 4), "v": _shape(4, 4)}
    plan = jl.plan(model, params, _shape(5, 6), config=jl.LoraConfig(rank=2))
    assert plan.targets["w"].materialized == ("sin", "cos")
    assert plan.targets["v"].materialized == ()
    (line,) = [line for line in str(plan).splitlines() if line.startswith("w ")]
    assert line.endswith("formed at sin, cos")


def test_no_flop_is_spent() -> None:
    """Weights of 4 TiB in a stack of a hundred, planned from shapes alone."""

    def model(params: Any, x: Any) -> Any:
        return lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]

    n = 2**20
    plan = jl.plan(model, {"w": _shape(100, n, n)}, _shape(64, n), config=jl.LoraConfig(rank=16))
    assert plan.targets["w"].layout == jl.Layout((100, n, n), (1,), (2,), (0,))
    assert plan.base_params == 100 * n * n
    assert plan.trainable_params == 100 * 16 * 2 * n
    assert plan.multiply_adds == 100 * 64 * n * n
    assert plan.extra_multiply_adds("w") == 100 * 64 * 16 * 2 * n
    assert plan.targets["w"].materialized == ()


def test_arguments_that_are_not_arrays_and_keywords(normal: Any) -> None:
    def model(params: Any, x: Any, train: bool, *, key: Any = None, scale: float = 1.0) -> Any:
        y = x @ params["w"] if train else x @ params["eval"]
        return y * scale + jax.random.normal(key, y.shape)

    params = {"w": _shape(6, 4), "eval": _shape(6, 4)}
    key = jax.random.key(0)
    config = jl.LoraConfig(rank=2)
    for train, used in ((True, "w"), (False, "eval")):
        plan = jl.plan(model, params, _shape(5, 6), train, config=config, key=key, scale=2.0)
        assert list(plan.targets) == [used]
    # Keyword arrays may be shapes as well.
    abstract = jax.eval_shape(lambda: key)
    plan = jl.plan(model, params, _shape(5, 6), True, config=config, key=abstract)
    assert list(plan.targets) == ["w"]


def test_the_default_config_adapts_every_product() -> None:
    plan = jl.plan(_model, _params(), _shape(5, 12))
    assert plan.config == jl.LoraConfig()
    assert len(plan.targets) == 3


# --------------------------------------------------------------------------------------- table


def _deep(depth: int = 24) -> tuple[Any, dict[str, Any]]:
    """A network with 12 parameters a layer and the function of them."""
    names = ("q", "k", "v", "o", "up", "down")
    layer = {name: {"kernel": _shape(8, 8), "bias": _shape(8)} for name in names}
    params = {f"layers_{k}": layer for k in range(depth)} | {"head": {"kernel": _shape(8, 4)}}

    def model(params: Any, x: Any) -> Any:
        for k in range(depth):
            for name in names:
                x = x @ params[f"layers_{k}"][name]["kernel"] + params[f"layers_{k}"][name]["bias"]
        return x @ params["head"]["kernel"]

    return model, params


def _column(text: str, name: str, right: bool = False) -> dict[str, str]:
    """One column of the first table, by the first word of each row."""
    lines = text.split("\ntrained ")[0].splitlines()[1:]
    start = lines[0].index(name)
    if right:
        end = start + len(name)
        return {line.split()[0]: line[:end].split()[-1] for line in lines[1:]}
    return {line.split()[0]: line[start:].split("  ")[0] for line in lines[1:]}


def test_a_table_of_289_parameters_is_short_and_loses_nothing() -> None:
    model, params = _deep()
    config = jl.LoraConfig(
        rank=2,
        targets=(
            jl.Rule("**/q/kernel", rank=4),
            jl.Rule("all-linear", layers=range(20, 24)),
            "layers_3/up/kernel",
        ),
    )
    plan = jl.plan(model, params, _shape(1, 8), config=config)
    text = str(plan)
    assert text == plan.table()
    assert len(text.splitlines()) < 30
    assert max(map(len, text.splitlines())) < 120
    trained = _column(text, "trained", right=True)
    assert trained["layers_{0..23}/q/kernel"] == f"{24 * 4 * 16:,}"
    assert trained["layers_{20..23}/up/kernel"] == f"{4 * 2 * 16:,}"
    assert trained["layers_3/up/kernel"] == f"{2 * 16:,}"
    assert "layers_{0..23}/q/kernel x24 " in text
    assert "layers_{0..2,4..19}/up/kernel x19 " in text
    assert "layers_{0..23}/down/bias x24 " in text
    # The columns add up to the totals.
    assert sum(int(n.replace(",", "")) for n in trained.values()) == plan.trainable_params
    madds = _column(text, "multiply-adds", right=True)
    total = sum(plan.extra_multiply_adds(path) for path in plan.targets)
    assert sum(int(n.replace(",", "")) for n in madds.values()) == total > 0

    full = plan.table(full=True)
    words = {line.split()[0] for line in full.splitlines() if line}
    assert {*plan.targets, *plan.skipped} <= words
    assert len(plan.targets) + len(plan.skipped) == 24 * 12 + 1
    assert "{" not in full
    # Everything but the rows is the same.
    for line in text.splitlines():
        assert line.startswith(("trained", "forward", "LoRA")) <= (line in full)


def test_a_short_table_ends_early_where_nothing_can_be_grouped() -> None:
    words = [a + b + c for a in "abcd" for b in "xyzw" for c in "klm"]
    params = {name: _shape(4, 4) for name in words} | {f"{name}!": _shape(4) for name in words}

    def model(params: Any, x: Any) -> Any:
        for name in words:
            x = x @ params[name]
        return x

    plan = jl.plan(model, params, _shape(1, 4), config=jl.LoraConfig(rank=2))
    text, full = str(plan), plan.table(full=True)
    assert text.count("and 8 more rows: plan.table(full=True)") == 2
    assert len(text.splitlines()) == 1 + 42 + 2 + 1 + 42
    assert len(full.splitlines()) == 1 + 49 + 2 + 1 + 49
    assert "more rows" not in full
    assert f"trained {plan.trainable_params:,} " in text


def test_what_differs_between_targets_has_a_column_and_the_rest_stands_first() -> None:
    targets = (jl.Rule("enc/l1/kernel", rank=2, init="gaussian"), "enc/l2/kernel")
    text = str(_plan(targets=targets))
    assert text.startswith("LoRA plan: float32, b zero\n")
    assert _column(text, "rank") == {"enc/l1/kernel": "2", "enc/l2/kernel": "3"}
    assert _column(text, "scale") == {"enc/l1/kernel": "3", "enc/l2/kernel": "2"}
    assert _column(text, "a   ") == {"enc/l1/kernel": "gaussian", "enc/l2/kernel": "kaiming"}
    text = str(_plan(targets=(jl.Rule("enc/l1/kernel", dtype="bfloat16"), "enc/l2/kernel")))
    assert text.startswith("LoRA plan: rank 3, scale 2, a kaiming, b zero\n")
    assert _column(text, "dtype") == {"enc/l1/kernel": "bfloat16", "enc/l2/kernel": "float32"}


# ---------------------------------------------------------------------------------------- init


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def test_init_makes_what_was_planned() -> None:
    plan = _plan(scaling="rslora")
    adapter = jl.init(jax.random.key(0), _zeros(_params()), plan)
    assert list(adapter) == list(plan.targets)
    for path, f in adapter.items():
        layout = plan.targets[path].layout
        assert f.layout == layout
        assert (f.a.shape, f.b.shape) == (layout.a_shape(3), layout.b_shape(3))
        assert np.asarray(f.a).all()
        assert not np.asarray(f.b).any()
        assert (f.scale.shape, f.scale.dtype, f.scale.weak_type) == ((), jnp.float32, False)
        assert float(f.scale) == pytest.approx(6 / math.sqrt(3), rel=1e-6)
    assert adapter.trainable_params == plan.trainable_params
    assert adapter.nbytes == plan.adapter_bytes


def test_init_honours_the_dtype_and_keeps_scale_in_float32() -> None:
    plan = _plan(dtype="bfloat16")
    adapter = jl.init(jax.random.key(0), _zeros(_params()), plan)
    for f in adapter.values():
        assert (f.a.dtype, f.b.dtype, f.scale.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert adapter.nbytes == plan.adapter_bytes


def test_init_does_not_touch_the_parameters_and_works_on_shapes_under_jit() -> None:
    plan = _plan()
    params = _zeros(_params())
    eager = jl.init(jax.random.key(0), params, plan)
    jitted = jax.jit(lambda key: jl.init(key, _params(), plan))(jax.random.key(0))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-7), eager, jitted)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(params))


def test_init_for_other_parameters_names_every_misfit() -> None:
    plan = _plan()
    params = _zeros(_params(head={"kernel": _shape(8, 3), "bias": _shape(3)}))
    params["enc"]["first"] = params["enc"].pop("l1")
    with pytest.raises(jl.AdapterError) as error:
        jl.init(jax.random.key(0), params, plan)
    assert "head/kernel: expected shape (8, 2), found (8, 3)" in str(error.value)
    assert "enc/l1/kernel: expected shape (12, 8), found nearest: 'enc/" in str(error.value)


def test_another_layer_never_changes_a_layer_s_start() -> None:
    """Keys come from paths: neither more layers nor their order shows in ``a``."""

    def deep(names: tuple[str, ...]) -> jl.Adapter:
        def model(params: Any, x: Any) -> Any:
            for name in names:
                x = x @ params[name]
            return x

        params = {name: jnp.zeros((4, 4)) for name in names}
        plan = jl.plan(model, params, jnp.zeros((1, 4)), config=jl.LoraConfig(rank=2))
        return jl.init(jax.random.key(0), params, plan)

    two, four = deep(("l2", "l5")), deep(("l1", "l5", "l2", "l3"))
    for name in ("l2", "l5"):
        np.testing.assert_array_equal(two[name].a, four[name].a)
    # Negative control: layers of one shape do not share their numbers, nor do seeds.
    assert len({np.asarray(f.a).tobytes() for f in four.values()}) == 4


def test_param_key() -> None:
    key = jax.random.key(0)

    def data(path: str, key: Any = key) -> tuple[int, ...]:
        return tuple(int(word) for word in jax.random.key_data(param_key(key, path)))

    paths = [f"params/l{k}/kernel" for k in range(100)]
    assert len({data(path) for path in paths}) == 100
    assert data("params/l1/kernel") == data("params/l1/kernel")
    assert data("params/l1/kernel") != data("params/l1/kernel", jax.random.key(1))
    # sha256("abc") begins with ba7816bf (FIPS 180-2, appendix B.1).
    want = jax.random.key_data(jax.random.fold_in(key, 0xBA7816BF))
    assert data("abc") == tuple(int(word) for word in want)
