"""A rule says which parameters are adapted and how; what it cannot do is an error."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_lora as jl
from jax_lora.rules import StoredPredicate, path_matches

DEPTH = 4


def _params(width: int = 64) -> dict[str, Any]:
    def layer() -> dict[str, Any]:
        return {
            "attn": {n: {"kernel": jnp.zeros((width, width))} for n in ("q", "v")},
            "mlp": {"kernel": jnp.zeros((width, 2 * width)), "bias": jnp.zeros(2 * width)},
            "down": {"kernel": jnp.zeros((2 * width, width))},
        }

    params: dict[str, Any] = {f"layers_{k}": layer() for k in range(DEPTH)}
    return params | {"head": {"kernel": jnp.zeros((width, 4))}, "spare": jnp.zeros((3, 3))}


def _model(params: Any, x: Any) -> Any:
    for k in range(DEPTH):
        layer = params[f"layers_{k}"]
        x = x @ layer["attn"]["q"]["kernel"] + x @ layer["attn"]["v"]["kernel"]
        x = (x @ layer["mlp"]["kernel"] + layer["mlp"]["bias"]) @ layer["down"]["kernel"]
    return x @ params["head"]["kernel"]


def _plan(*targets: str | jl.Rule, **config: Any) -> jl.Plan:
    lora = jl.LoraConfig(**{"rank": 4, "alpha": 8.0, "targets": targets, **config})
    params = jax.eval_shape(_params)
    return jl.plan(_model, params, jax.ShapeDtypeStruct((1, 64), jnp.float32), config=lora)


def _refused(*targets: str | jl.Rule, **config: Any) -> list[str]:
    """The lines of the error below its heading."""
    with pytest.raises(jl.TargetError) as error:
        _plan(*targets, **config)
    heading, *lines = str(error.value).splitlines()
    assert heading.startswith("expected every target and exclusion to match")
    assert all(line.startswith("  ") for line in lines)
    return [line.strip() for line in lines]


def _kernel(k: int, name: str) -> str:
    return f"layers_{k}/{name}/kernel"


# ------------------------------------------------------------------------------- what it does


def test_ranks_and_alphas_by_pattern_are_what_each_target_gets() -> None:
    """Rank-pattern and alpha-pattern tables: every path's rank, alpha and scale, in closed form."""
    plan = _plan(
        jl.Rule("**/q/kernel", rank=16),  # the config's alpha
        jl.Rule("**/v/kernel", rank=2, alpha=3.0),
        jl.Rule("**/mlp/kernel", alpha=-1.0, scaling="alpha"),  # the config's rank
        jl.Rule("**/down/kernel", rank=9, scaling="rslora"),
        "head/kernel",
    )
    expected = {"head/kernel": (4, 8.0, 8 / 4, "head/kernel")}
    for k in range(DEPTH):
        expected |= {
            _kernel(k, "attn/q"): (16, 8.0, 8 / 16, "**/q/kernel"),
            _kernel(k, "attn/v"): (2, 3.0, 3 / 2, "**/v/kernel"),
            _kernel(k, "mlp"): (4, -1.0, -1.0, "**/mlp/kernel"),
            _kernel(k, "down"): (9, 8.0, 8 / 3, "**/down/kernel"),
        }
    found = {p: (t.rank, t.alpha, t.scale, t.rule) for p, t in plan.targets.items()}
    assert found == expected

    adapter = jl.init(jax.random.key(0), _params(), plan)
    assert set(adapter) == set(expected)
    rows = {"q": 128, "v": 128, "mlp": 192, "down": 192, "head": 68}
    total = 0
    for path, (rank, _, scale, _) in expected.items():
        factors, fans = adapter[path], rows[path.split("/")[-2]]
        assert factors.rank == rank
        assert float(factors.scale) == pytest.approx(scale, rel=1e-6)
        assert factors.a.size + factors.b.size == rank * fans == plan.trainable(path)
        assert plan.extra_multiply_adds(path) == rank * fans  # of one row
        total += rank * fans
    assert adapter.trainable_params == plan.trainable_params == total
    assert adapter.nbytes == plan.adapter_bytes == 4 * total + 4 * len(expected)


def test_init_and_dtype_by_rule_on_the_arrays() -> None:
    plan = _plan(
        jl.Rule("**/q/kernel", init="gaussian", dtype="bfloat16", rank=32),
        jl.Rule("**/v/kernel", init="article", rank=16, dtype="float32"),
        jl.Rule("**/mlp/kernel", rank=16),
        dtype="float16",
    )
    adapter = jl.init(jax.random.key(0), _params(), plan)
    dtypes = {"q": jnp.bfloat16, "v": jnp.float32, "mlp": jnp.float16}
    drawn: dict[str, list[np.ndarray]] = {"q": [], "v": [], "mlp": []}
    for path, f in adapter.items():
        name = path.split("/")[-2]
        assert (f.a.dtype, f.b.dtype, f.scale.dtype) == (*[dtypes[name]] * 2, jnp.float32)
        assert not np.asarray(f.b, np.float64).any()
        drawn[name].append(np.asarray(f.a, np.float64).ravel())
    a = {name: np.concatenate(values) for name, values in drawn.items()}
    # Normal with deviation 1/r: 8,192 numbers, within 5 standard errors, and beyond 3 deviations.
    assert a["q"].size == 8192
    assert a["q"].std() == pytest.approx(1 / 32, rel=5 / math.sqrt(2 * 8192))
    assert np.abs(a["q"]).max() > 3 / 32
    # Uniform on ±1/sqrt(r) and on ±1/sqrt(in); half precision rounds by 2^-11.
    for name, bound in (("v", 1 / 4), ("mlp", 1 / 8)):
        assert 0.99 * bound < np.abs(a[name]).max() <= bound * (1 + 2**-10)
        assert a[name].std() == pytest.approx(bound / math.sqrt(3), rel=0.04)
    itemsizes = sum(f.a.nbytes + f.b.nbytes + 4 for f in adapter.values())
    # Two bytes each, in v four.
    in_closed_form = 2 * plan.trainable_params + 2 * DEPTH * 16 * 128 + 4 * 12
    assert plan.adapter_bytes == adapter.nbytes == itemsizes == in_closed_form


def test_a_rule_that_sets_nothing_is_its_glob() -> None:
    one, other = _plan("**/kernel"), _plan(jl.Rule("**/kernel"))
    assert one.targets == other.targets
    assert str(one) == str(other)
    adapters = [jl.init(jax.random.key(0), _params(), plan) for plan in (one, other)]
    jax.tree.map(np.testing.assert_array_equal, *adapters)


def test_the_rank_of_a_rule_changes_no_other_target_s_start() -> None:
    """Keys come from paths, not from rules."""
    adapters = [
        jl.init(jax.random.key(0), _params(), plan)
        for plan in (_plan("**/kernel"), _plan(jl.Rule("**/q/*", rank=8), "**/kernel"))
    ]
    for path in adapters[0]:
        same = adapters[0][path].a.shape == adapters[1][path].a.shape
        assert same is ("/q/" not in path)
        if same:
            np.testing.assert_array_equal(adapters[0][path].a, adapters[1][path].a)


def test_adapted_with_rules_the_model_is_that_of_dense_weights(
    check_dense: Any, filled: Any, normal: Any
) -> None:
    params = {"l1": normal(6, 5), "l2": normal(5, 5), "l3": normal(5, 3)}

    def model(params: Any, x: Any) -> Any:
        return jnp.tanh(jnp.tanh(x @ params["l1"]) @ params["l2"]) @ params["l3"]

    targets = (jl.Rule("l1", rank=1), jl.Rule("*", layers=(2,), rank=4, scaling="alpha"), "l3")
    config = jl.LoraConfig(rank=2, targets=targets)
    plan = jl.plan(model, params, normal(4, 6), config=config)
    adapter = jl.init(jax.random.key(0), params, plan)
    np.testing.assert_array_equal(
        jl.apply(model)(params, adapter, normal(4, 6)), model(params, normal(4, 6))
    )
    assert [f.rank for f in adapter.values()] == [1, 4, 2]
    check_dense(model, params, filled(adapter), normal(4, 6))


def test_rank_is_checked_for_each_rule_against_its_own_weights() -> None:
    with pytest.raises(jl.ConfigError) as error:
        _plan(jl.Rule("**/q/*", rank=65), jl.Rule("head/*", rank=5), "**/mlp/kernel", rank=99)
    assert [line.strip() for line in str(error.value).splitlines()] == [
        f"{label}expected a rank of at most {most}, the largest min(in, out) of the adapted "
        f"weights, above which a rank only repeats itself; got rank={rank}"
        for label, most, rank in (
            ("targets[0] '**/q/*': ", 64, 65),
            ("targets[1] 'head/*': ", 4, 5),
            ("", 64, 99),
        )
    ]
    # The config's rank has to suit one of those that inherit it; for the others it is a note.
    plan = _plan(jl.Rule("**/q/*", rank=64), "head/*", "**/mlp/kernel", rank=5)
    assert "rank exceeds min(in, out) = 4" in str(plan)
    # Whatever else is wrong stands in the same error.
    lines = _refused(jl.Rule("head/*", rank=5), "**/k/*")
    assert [line.split(" ", 1)[0] for line in lines] == ["targets[1]", "targets[0]"]


# ---------------------------------------------------------------------------- what it matches


@pytest.mark.parametrize(
    ("glob", "matching", "other"),
    [
        ("**/kernel", ["kernel", "a/kernel", "a/b/kernel"], ["kernels", "a/xkernel", "kernel/a"]),
        ("*/kernel", ["a/kernel", "/kernel"], ["kernel", "a/b/kernel"]),
        ("*", ["kernel"], ["a/kernel"]),
        ("**", ["kernel", "a/b/c"], []),
        ("enc/**", ["enc", "enc/a", "enc/a/b"], ["encoder", "x/enc/a"]),
        ("enc/**/w", ["enc/w", "enc/a/w", "enc/a/b/w"], ["w", "enc/aw", "encw"]),
        ("l?/w", ["l1/w", "lx/w"], ["l/w", "l12/w", "l//w"]),
        ("l[1]/w+", ["l[1]/w+"], ["l1/w", "l1/ww"]),
        ("a.b", ["a.b"], ["axb", "a.b\n"]),
        ("l*/w*", ["l1/w", "l/weight"], ["l1/x/w", "xl/w"]),
        ("l{layer}/w", ["l1/w", "l12/w"], ["l/w", "lx/w", "l1x/w", "l{layer}/w"]),
        ("re:.*/(q|v)/w", ["a/q/w", "a/b/v/w"], ["q/w", "a/k/w", "a/q/wx", "a/q/w\n"]),
        ("re:l[12]", ["l1", "l2"], ["l3", "l12", "xl1"]),
        ("x:l[12]", ["x:l[12]"], ["x:l1"]),
    ],
)
def test_patterns(glob: str, matching: list[str], other: list[str]) -> None:
    assert [path for path in (*matching, *other) if path_matches(glob, path)] == matching


@pytest.mark.parametrize(
    ("match", "path", "layer"),
    [
        ("**", "layers_3/mlp/Dense_0/kernel", 3),
        ("**", "h/12/attn/kernel", 12),
        ("**", "block007/w", 7),
        ("**", "params/h/3", 3),
        ("**", "conv2d/w", None),
        ("**", "head/kernel", None),
        ("all-linear", "l5/w", 5),
        ("**/layers_{layer}/**", "enc_1/layers_3/w", 3),
        ("**", "enc_1/layers_3/w", 1),
        ("re:enc_1/layers_(?P<layer>[0-9]+)/w", "enc_1/layers_3/w", 3),
        ("re:enc_1/(?P<layer>[a-z]+)_3/w", "enc_1/layers_3/w", None),
        (lambda path, shape, uses: True, "l5/w", 5),
    ],
)
def test_the_layer_of_a_path(match: Any, path: str, layer: int | None) -> None:
    assert jl.Rule(match).layer(path) == layer


def test_regular_expressions_match_the_whole_path() -> None:
    plan = _plan("re:layers_[02]/attn/(q|v)/kernel", exclude="re:.*_2/.*/v/.*")
    assert set(plan.targets) == {_kernel(0, "attn/q"), _kernel(0, "attn/v"), _kernel(2, "attn/q")}
    assert plan.skipped[_kernel(2, "attn/v")] == "excluded by re:.*_2/.*/v/.*"
    assert _refused("re:layers_0/attn/q")[0].startswith("targets[0] 're:layers_0/attn/q' matches")


def test_the_first_rule_decides_and_all_linear_is_a_rule_like_any_other() -> None:
    plan = _plan(
        jl.Rule("**/q/kernel", layers=(0,), rank=1),
        jl.Rule("**/q/kernel", rank=2),
        jl.Rule("all-linear", rank=3),
    )
    ranks = {path: target.rank for path, target in plan.targets.items()}
    assert ranks.pop(_kernel(0, "attn/q")) == 1
    assert all(ranks.pop(_kernel(k, "attn/q")) == 2 for k in range(1, DEPTH))
    assert set(ranks.values()) == {3}
    assert len(ranks) == 3 * DEPTH + 1


def test_layers() -> None:
    first = _plan(jl.Rule("**/kernel", layers=range(2)))
    assert set(first.targets) == {
        _kernel(k, name) for k in range(2) for name in ("attn/q", "attn/v", "mlp", "down")
    }
    outside = "outside the layers of the targets that match it"
    assert first.skipped[_kernel(2, "mlp")] == first.skipped["head/kernel"] == outside
    assert first.skipped["layers_3/mlp/bias"] == "used by add, not as a matrix"
    assert first.targets[_kernel(0, "mlp")].rule == "**/kernel, layers 0, 1"
    for layers in ((3, 1), [1, 3, 3], range(1, 4, 2)):
        plan = _plan(jl.Rule("**/layers_{layer}/mlp/kernel", layers=layers))  # type: ignore[arg-type]
        assert list(plan.targets) == [_kernel(1, "mlp"), _kernel(3, "mlp")]
    # What could not be adapted in any layer says that.
    plan = _plan(jl.Rule("**/mlp/*", layers=(1,)), exclude="layers_1/mlp/bias")
    assert plan.skipped["layers_2/mlp/bias"] == "used by add, not as a matrix"
    assert plan.skipped["layers_2/mlp/kernel"] == outside
    # What one rule leaves, the next takes; presets and predicates have layers too.
    plan = _plan(
        jl.Rule("all-linear", layers=(1,)),
        jl.Rule(lambda path, shape, uses: shape[0] == 128, layers=(2,)),
        "head/kernel",
    )
    expected = [_kernel(1, name) for name in ("attn/q", "attn/v", "down", "mlp")]
    assert sorted(plan.targets) == ["head/kernel", *expected, _kernel(2, "down")]


def test_layers_that_do_not_exist_are_named() -> None:
    assert _refused(jl.Rule("**/mlp/kernel", layers=range(2, 7))) == [
        "targets[0] '**/mlp/kernel, layers 2-6' matches layers 0-3, and none of 4-6"
    ]
    assert _refused(jl.Rule("head/kernel", layers=(0,))) == [
        "targets[0] 'head/kernel, layers 0' decides nothing: 'head/kernel' is in no layer"
    ]


def test_the_layers_of_a_scan_cannot_be_split() -> None:
    def model(params: Any, x: Any) -> Any:
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"]["w"])[0]

    params, x = {"stack": {"w": jnp.zeros((12, 8, 8))}}, jnp.zeros((1, 8))
    for match in ("**/w", "all-linear", lambda path, shape, uses: True):
        config = jl.LoraConfig(rank=2, targets=jl.Rule(match, layers=range(6)))
        with pytest.raises(jl.TargetError) as error:
            jl.plan(model, params, x, config=config)
        assert len(str(error.value).splitlines()) == 2
        assert "stack/w: targets[0] " in str(error.value)
        assert (
            "cannot take some of its layers, as they are stacked in one parameter of shape "
            "[12, 8, 8]; leave out layers=" in str(error.value)
        )
    # Excluded, or taken before, it is no mistake; without layers it is one target.
    fine = jl.plan(model, params, x, config=jl.LoraConfig(rank=2, targets=jl.Rule("**/w")))
    assert list(fine.targets) == ["stack/w"]


def test_a_stack_inside_a_numbered_layer_has_that_layer() -> None:
    """Experts, say: the stack is not one of layers."""

    def model(params: Any, x: Any) -> Any:
        for k in range(2):
            x = jnp.einsum("ebi,eio->ebo", x, params[f"layers_{k}"])
        return x

    params = {f"layers_{k}": jnp.zeros((3, 8, 8)) for k in range(2)}
    config = jl.LoraConfig(rank=2, targets=jl.Rule("*", layers=(1,)))
    plan = jl.plan(model, params, jnp.zeros((3, 5, 8)), config=config)
    assert list(plan.targets) == ["layers_1"]
    assert plan.targets["layers_1"].layout.stack_axes == (0,)


def test_predicates_see_path_shape_and_uses_of_what_can_be_adapted() -> None:
    seen = {}

    def costly(path: str, shape: tuple[int, ...], uses: tuple[Any, ...]) -> bool:
        seen[path] = (shape, [use.primitive for use in uses])
        return sum(use.multiply_adds for use in uses) > 64 * 64

    plan = _plan(jl.Rule(costly, rank=2), jl.Rule(lambda path, *_: path == "head/kernel", rank=1))
    assert {p: t.rank for p, t in plan.targets.items()} == {"head/kernel": 1} | {
        _kernel(k, name): 2 for k in range(DEPTH) for name in ("mlp", "down")
    }
    assert seen["head/kernel"] == ((64, 4), ["dot_general"])
    assert seen[_kernel(0, "mlp")] == ((64, 128), ["dot_general"])
    assert "spare" not in seen  # never used
    assert "layers_0/mlp/bias" not in seen  # not a matrix
    assert plan.targets[_kernel(0, "mlp")].rule == "predicate costly"


def test_an_error_in_a_predicate_names_the_parameter() -> None:
    rule = jl.Rule(lambda path, shape, uses: shape[2] > 1)
    with pytest.raises(IndexError) as error:
        _plan(rule)
    assert error.value.__notes__ == ["raised by the predicate <lambda> for head/kernel"]


# ------------------------------------------------------------------------- what is a mistake


def test_a_pattern_of_what_parameters_are_below_says_what_to_write() -> None:
    """As of a Flax NNX state, whose kernels are at ``.../kernel/value``."""

    def model(params: Any, x: Any) -> Any:
        for layer in params.values():
            x = x @ layer["kernel"]["value"]
        return x

    params = {name: {"kernel": {"value": jnp.zeros((8, 8))}} for name in ("l1", "l2")}
    config = jl.LoraConfig(
        rank=2, targets=("**/kernel", "re:.*1/kernel", "l2", "**/kernal"), exclude=("l1/kernel",)
    )
    with pytest.raises(jl.TargetError) as error:
        jl.plan(model, params, jnp.zeros((3, 8)), config=config)
    asked, found = str(error.value).splitlines()[1:], "matches no parameter"
    below = "(parameters are below; write "
    assert asked == [
        f"  targets[0] '**/kernel' {found} {below}'**/kernel/value')",
        f"  targets[1] 're:.*1/kernel' {found} {below}'re:.*1/kernel/value')",
        f"  targets[2] 'l2' {found} {below}'l2/**')",
        f"  targets[3] '**/kernal' {found} (nearest: 'l2/kernel/value', 'l1/kernel/value')",
        f"  exclude[0] 'l1/kernel' {found} {below}'l1/kernel/value')",
    ]
    written = jl.LoraConfig(rank=2, targets="**/kernel/value")
    assert len(jl.plan(model, params, jnp.zeros((3, 8)), config=written).targets) == 2


def test_near_misses_of_every_rule_that_matches_nothing() -> None:
    lines = _refused("**/kernal", jl.Rule("re:heed/kernel", rank=2), "all-lineer", "all-linear")
    assert lines[0].startswith("targets[0] '**/kernal' matches no parameter (nearest: ")
    assert lines[1].startswith("targets[1] 're:heed/kernel' matches no parameter (nearest: 'head/k")
    assert lines[2].startswith(
        "targets[2] 'all-lineer' matches no parameter (nearest: 'all-linear', "
    )
    assert len(lines) == 3
    assert _refused("all-linear", jl.Rule(lambda path, shape, uses: len(shape) > 2)) == [
        "targets[1] 'predicate <lambda>' matches none of the 17 parameters that can be adapted"
    ]


def test_a_shadowed_rule_names_the_earlier_one() -> None:
    assert _refused("**/kernel", jl.Rule("head/*", rank=2)) == [
        "targets[1] 'head/*' decides nothing: 'head/kernel' is taken by targets[0] '**/kernel'"
    ]
    # Negative control: in the other order both decide.
    assert _plan(jl.Rule("head/*", rank=2), "**/kernel").targets["head/kernel"].rank == 2
    # By several, in part by an exclusion, or of any kind.
    lines = _refused(
        "**/q/kernel",
        "**/v/kernel",
        jl.Rule("layers_0/**/kernel", rank=2),
        jl.Rule(lambda path, shape, uses: shape == (64, 64)),
        exclude=("**/mlp/*", "**/down/*"),
    )
    assert len(lines) == 2
    assert lines[0] == (
        "targets[2] 'layers_0/**/kernel' decides nothing: "
        "'layers_0/attn/q/kernel' is taken by targets[0] '**/q/kernel', "
        "'layers_0/attn/v/kernel' is taken by targets[1] '**/v/kernel', "
        "'layers_0/down/kernel' is excluded by **/down/* and 1 more"
    )
    assert lines[1].startswith("targets[3] 'predicate <lambda>' decides nothing: ")
    assert "'layers_0/attn/q/kernel' is taken by targets[0] '**/q/kernel'" in lines[1]
    assert lines[1].endswith(" and 5 more")
    assert "decides nothing" in _refused("all-linear", "all-linear")[0]
    # Two rules of one name are two rules.
    plan = _plan(*(jl.Rule(lambda p, *_, n=n: n in p, rank=k + 1) for k, n in enumerate("qv")))
    assert {t.rank for t in plan.targets.values()} == {1, 2}


def test_all_mistakes_are_in_one_error() -> None:
    lines = _refused(
        "**/kernal",
        jl.Rule("**/q/kernel", layers=range(9)),
        jl.Rule("**/bias", rank=2),
        "spare",
        jl.Rule("head/kernel", rank=5),
        jl.Rule("**/q/*", rank=2),
        exclude=("decoder/**",),
    )
    expected = [
        "targets[0] '**/kernal' matches no parameter",
        "targets[1] '**/q/kernel, layers 0-8' matches layers 0-3, and none of 4-8",
        "targets[5] '**/q/*' decides nothing",
        "exclude[0] 'decoder/**' matches no parameter",
        *[f"layers_{k}/mlp/bias: matched by '**/bias' but used by add" for k in range(DEPTH)],
        "spare: matched by 'spare' but the function never uses it",
        "targets[4] 'head/kernel': expected a rank of at most 4",
    ]
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"match": ""}, "a pattern over parameter paths, got ''"),
        ({"match": "re:"}, "a pattern over parameter paths, got 're:'"),
        ({"match": "re:a("}, "a pattern over parameter paths, got 're:a(': missing )"),
        ({"match": "{layer}/{layer}"}, "'{layer}' stands in it twice"),
        ({"match": 3}, "expected match to be a glob"),
        ({"match": None}, "got match=None"),
        ({"layers": 3}, "expected layers to be numbers from 0"),
        ({"layers": ()}, "got layers=()"),
        ({"layers": range(0)}, "got layers=range(0, 0)"),
        ({"layers": (-1,)}, "got layers=(-1,)"),
        ({"layers": (1.0,)}, "got layers=(1.0,)"),
        ({"layers": (True,)}, "got layers=(True,)"),
        ({"layers": "12"}, "got layers='12'"),
        ({"rank": 0}, "expected a rank of at least 1, an integer; got rank=0"),
        ({"alpha": math.inf}, "expected alpha to be a finite number"),
        ({"scaling": "rs-lora"}, "nearest: 'rslora'"),
        ({"init": "zeros"}, "expected init to be one of"),
        ({"dtype": "int8"}, "expected a floating-point dtype"),
    ],
)
def test_a_bad_value_is_refused_and_the_rule_named(fields: Any, expected: str) -> None:
    with pytest.raises(jl.ConfigError) as error:
        jl.Rule(**{"match": "enc/**", **fields})
    assert expected in str(error.value)
    assert str(error.value).startswith(f"Rule(match={fields.get('match', 'enc/**')!r}): ")


def test_numbers_of_other_libraries_are_numbers() -> None:
    rule = jl.Rule("**", rank=np.int64(4), alpha=np.float32(8), dtype=jnp.bfloat16)  # type: ignore[arg-type]
    assert jl.Rule.from_json(json.loads(json.dumps(rule.to_json()))) == rule
    assert (rule.rank, rule.alpha, rule.dtype) == (4, 8.0, "bfloat16")


def test_all_bad_values_of_a_rule_are_in_one_error() -> None:
    with pytest.raises(jl.ConfigError) as error:
        jl.Rule("re:(", layers=(), rank=0, alpha=math.nan, dtype="int8")
    assert len(str(error.value).splitlines()) == 5


# ------------------------------------------------------------------------------------- JSON


def _large(path: str, shape: tuple[int, ...], uses: tuple[Any, ...]) -> bool:
    return math.prod(shape) > 64 * 64


class _Named:
    def __init__(self, name: str):
        self.name = name

    def __call__(self, path: str, shape: tuple[int, ...], uses: tuple[Any, ...]) -> bool:
        return self.name in path


def test_json_has_every_field_and_none_that_is_not_set() -> None:
    rule = jl.Rule("**/q", range(2), 3, 0.5, "rslora", "gaussian", "bfloat16", "dora", 0.25, "auto")
    rows = jl.Rule("**/q", rows=(4, 2))
    data = rule.to_json()
    # Rows and a variant exclude each other.
    assert {*data, *rows.to_json()} == {field.name for field in dataclasses.fields(rule)}
    assert jl.Rule.from_json(json.loads(json.dumps(data))) == rule
    assert jl.Rule.from_json(json.loads(json.dumps(rows.to_json()))) == rows
    assert rows.rows == (2, 4)
    assert jl.Rule("**/q").to_json() == {"match": "**/q"}
    assert jl.Rule.from_json({"match": "**/q"}) == jl.Rule("**/q")
    assert hash(rule) == hash(jl.Rule.from_json(data))
    # Layers are a set, in whatever form they are given.
    assert jl.Rule("**", (3, 1)) == jl.Rule("**", [1, 3, 3]) == jl.Rule("**", range(1, 4, 2))  # type: ignore[arg-type]


def test_json_keeps_the_name_of_a_predicate_and_says_so_when_it_is_needed() -> None:
    config = jl.LoraConfig(targets=(jl.Rule(_large, rank=2), jl.Rule(_Named("head"), rank=1)))
    data = json.loads(json.dumps(config.to_json()))
    module = _large.__module__
    assert data["targets"] == [
        {"match": {"predicate": f"{module}._large"}, "rank": 2},
        {"match": {"predicate": f"{module}._Named"}, "rank": 1},
    ]
    restored = jl.LoraConfig.from_json(data)
    assert restored.rules[0].match == StoredPredicate(f"{module}._large")
    assert restored != config
    assert restored.to_json() == config.to_json()
    with pytest.raises(jl.ConfigError, match=rf"'{module}._large', got its name alone"):
        _plan(targets=restored.targets)


def test_a_checkpoint_keeps_rules(tmp_path: Any) -> None:
    plan = _plan(jl.Rule("**/q/kernel", layers=range(2), rank=2), jl.Rule(_large, init="gaussian"))
    adapter = jl.init(jax.random.key(0), _params(), plan)
    jl.io.save_adapter(tmp_path / "adapter", adapter, plan.config)
    found, config, _ = jl.io.load_adapter(tmp_path / "adapter", _params())
    jax.tree.map(np.testing.assert_array_equal, found, adapter)
    assert config is not None
    assert config.rules[0] == plan.config.rules[0]
    assert config.rules[1].name == f"predicate {_large.__module__}._large"
    assert dataclasses.replace(config, targets=plan.config.targets) == plan.config


def test_presets_are_about_use_and_not_about_names() -> None:
    params = {
        "a": jnp.ones((8, 8)),  # a linear layer
        "b": jnp.ones((3, 8, 8)),  # a convolution
        "c": jnp.ones((11, 8)),  # an embedding
        "d": jnp.ones((11, 8)),  # an embedding that is the head as well
        "e": jnp.ones(8),
    }

    def model(p: Any, ids: Any) -> Any:
        x = (p["c"][ids] + p["d"][ids]) @ p["a"] + p["e"]
        x = lax.conv_general_dilated(
            x[None], p["b"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return x[0] @ p["d"].T

    def selected(**values: Any) -> str:
        config = jl.LoraConfig(rank=1, **values)
        return "".join(jl.plan(model, params, jnp.arange(4), config=config).targets)

    assert selected() == selected(targets="all-linear") == "a"
    assert selected(targets="all-convolution") == "b"
    assert selected(targets="all-embedding") == "cd"
    assert selected(targets="all") == "abcd"
    assert selected(targets="all", variant="full") == "abcde"
    assert selected(targets=(jl.Rule("all-embedding", rank=1), "all-linear")) == "acd"
    assert jl.LoraConfig(targets="all-embedding").rules[0].name == "all-embedding"
    with pytest.raises(jl.TargetError, match=r"'all-conv' matches no parameter .*all-convolution"):
        selected(targets="all-conv")
