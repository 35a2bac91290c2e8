"""Arithmetic on adapters, and merging them into parameters."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl

LAYOUTS = {
    "matrix": jl.Layout((6, 4), (0,), (1,)),
    "transposed": jl.Layout((4, 6), (1,), (0,)),
    "stack": jl.Layout((3, 6, 4), (1,), (2,), (0,)),
    "heads": jl.Layout((6, 2, 4), (0,), (1, 2)),
    "interleaved": jl.Layout((2, 4, 3), (0, 2), (1,)),
    "experts last": jl.Layout((6, 4, 3), (0,), (1,), (2,)),  # its permutation is no involution
}


@pytest.fixture
def case(filled: Any, normal: Any) -> tuple[dict[str, Any], jl.Adapter]:
    params = {name: normal(*layout.shape) for name, layout in LAYOUTS.items()}
    params["bias"] = normal(4)
    zeros = {
        name: jl.LoraFactors(
            jnp.zeros(layout.a_shape(2)), jnp.zeros(layout.b_shape(2)), jnp.float32(1), layout
        )
        for name, layout in LAYOUTS.items()
    }
    return params, filled(jl.Adapter(zeros))


def test_merge_is_w_plus_scale_a_b(case: Any, dense64: Any) -> None:
    params, adapter = case
    merged, want = jl.merge(params, adapter), dense64(params, adapter)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for name in LAYOUTS:
        np.testing.assert_allclose(merged[name], want[name], rtol=0, atol=2e-6 * 5)
        assert np.abs(want[name] - np.asarray(params[name])).max() > 0.1
    assert merged["bias"] is params["bias"]


def test_one_element_by_hand() -> None:
    layout = jl.Layout((2, 3, 2), in_axes=(2,), out_axes=(1,), stack_axes=(0,))
    a = jnp.arange(8.0).reshape(2, 2, 2)  # [stack, in, rank]
    b = jnp.arange(12.0).reshape(2, 2, 3)  # [stack, rank, out]
    adapter = jl.Adapter({"w": jl.LoraFactors(a, b, jnp.float32(0.5), layout)})
    merged = jl.merge({"w": jnp.ones((2, 3, 2))}, adapter)["w"]
    # W[s, o, i] = 1 + 0.5 sum_r a[s, i, r] b[s, r, o]; at s=1, o=2, i=0: a = (4, 5), b = (8, 11).
    assert float(merged[1, 2, 0]) == 1 + 0.5 * (4 * 8 + 5 * 11)


def test_unmerge_takes_it_out_to_rounding(case: Any) -> None:
    params, adapter = case
    back = jl.unmerge(jl.merge(params, adapter), adapter)
    for name in params:
        size = np.abs(np.asarray(jl.merge(params, adapter)[name])).max()
        np.testing.assert_allclose(back[name], params[name], rtol=0, atol=2**-22 * size)
    # Negative control: without the negative sign it would be far off.
    twice = jl.merge(jl.merge(params, adapter), adapter)
    assert np.abs(np.asarray(twice["matrix"] - params["matrix"])).max() > 0.1


def test_switching_tasks_the_article_s_way(case: Any, filled: Any) -> None:
    """Subtract ``B A``, add ``B' A'``: the other task's merged model, to rounding."""
    params, adapter = case
    other = filled(adapter, seed=9, scale=-1.3)
    switched = jl.merge(jl.unmerge(jl.merge(params, adapter), adapter), other)
    for name, want in jl.merge(params, other).items():
        np.testing.assert_allclose(switched[name], want, rtol=0, atol=5e-6)
    assert not np.allclose(switched["matrix"], jl.merge(params, adapter)["matrix"])


def test_a_zero_b_merges_bit_for_bit(case: Any) -> None:
    params, adapter = case
    zero = {n: dataclasses.replace(f, b=jnp.zeros_like(f.b)) for n, f in adapter.items()}
    jax.tree.map(np.testing.assert_array_equal, jl.merge(params, jl.Adapter(zero)), params)


def test_a_bf16_weight_is_rounded_once(case: Any, delta64: Any) -> None:
    params, adapter = case
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    merged = jl.merge(half, adapter)
    for name in LAYOUTS:
        assert merged[name].dtype == jnp.bfloat16
        exact = np.asarray(half[name], np.float64) + delta64(adapter[name])
        # Half a unit in the last of 8 bits, and float32's own rounding before it.
        bound = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 8) + 1e-6
        assert (np.abs(np.asarray(merged[name], np.float64) - exact) <= bound).all()


def test_merge_works_under_jit_and_vmap(case: Any) -> None:
    params, adapter = case
    eager = jl.merge(params, adapter)
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=0, atol=5e-6),
        jax.jit(jl.merge)(params, adapter),
        eager,
    )
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), adapter)
    both = jax.vmap(jl.merge, in_axes=(None, 0))(params, many)
    np.testing.assert_allclose(both["matrix"][0], eager["matrix"], rtol=0, atol=5e-6)
    delta = np.asarray(eager["matrix"] - params["matrix"])
    np.testing.assert_allclose(  # all of a, b and scale doubled
        both["matrix"][1], params["matrix"] + 8 * delta, rtol=0, atol=5e-5
    )


def test_every_misfit_is_named_at_once(case: Any) -> None:
    params, adapter = case
    wrong = {**params, "matrix": jnp.zeros((6, 5))}
    del wrong["heads"]
    with pytest.raises(jl.AdapterError) as error:
        jl.merge(wrong, adapter)
    assert "matrix: made for shape (6, 4), found (6, 5)" in str(error.value)
    assert "heads: no such parameter" in str(error.value)
    with pytest.raises(jl.AdapterError):
        jl.unmerge(wrong, adapter)


def test_a_thousand_switches_from_a_kept_base_are_one_switch(
    entry: Any, normal: Any, delta64: Any
) -> None:
    """Measured: subtracting and adding drifts, merging into the kept base has no history."""
    layout, unit = jl.Layout((48, 32), (0,), (1,)), 2.0**-24
    base = {"w": normal(48, 32)}
    tasks = [jl.Adapter({"w": entry(layout, rank=4, seed=k, scale=0.1)}) for k in range(10)]
    order = np.random.default_rng(3).integers(0, len(tasks), 1001)
    merge, unmerge = jax.jit(jl.merge), jax.jit(jl.unmerge)
    exact = [np.asarray(base["w"], np.float64) + delta64(task["w"]) for task in tasks]
    first = {k: np.asarray(merge(base, tasks[k])["w"]) for k in set(order.tolist())}
    size = max(np.abs(w).max() for w in exact)

    drifting = merge(base, tasks[order[0]])
    largest = 0.0  # of all intermediate results, each of which is rounded
    for previous, following in itertools.pairwise(order.tolist()):
        taken_out = unmerge(drifting, tasks[previous])
        drifting = merge(taken_out, tasks[following])
        largest = max(largest, *(float(jnp.abs(w["w"]).max()) for w in (taken_out, drifting)))
        kept = merge(base, tasks[following])
        np.testing.assert_array_equal(kept["w"], first[following])

    # One rounding of the sum, and those of a b: r products and sums, and the scale.
    a, b = (np.abs(np.asarray(x)) for x in (tasks[order[-1]]["w"].a, tasks[order[-1]]["w"].b))
    kept_error = np.abs(np.asarray(kept["w"], np.float64) - exact[order[-1]])
    assert (kept_error <= unit * np.abs(exact[order[-1]]) + 6 * unit * 0.1 * (a @ b)).all()
    # Two roundings a switch, each of at most half a unit in the last place of the result; the
    # rounding of a b itself is taken out as it was put in.
    drift = np.abs(np.asarray(drifting["w"], np.float64) - exact[order[-1]]).max()
    assert drift <= 2 * 1000 * unit * largest + 6 * unit * size
    # It does add up: far beyond the one rounding of the kept base (measured: a hundred times).
    assert drift > 30 * kept_error.max()


def test_delta_is_the_update_in_the_weight_s_axes(case: Any, delta64: Any) -> None:
    params, adapter = case
    updates = jl.delta(adapter)
    merged = jl.merge(jax.tree.map(jnp.zeros_like, params), adapter)
    assert list(updates) == list(adapter)
    for name, update in updates.items():
        np.testing.assert_allclose(update, delta64(adapter[name]), rtol=0, atol=5e-6)
        np.testing.assert_allclose(update, merged[name], rtol=0, atol=5e-6)


def test_delta_of_stacked_adapters_goes_through_vmap(case: Any, delta64: Any) -> None:
    _, adapter = case
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), adapter)
    with pytest.raises(
        jl.AdapterError, match=r"experts last: expected a, b of shapes .* jax\.vmap"
    ):
        jl.delta(many)
    both = jax.vmap(jl.delta)(many)
    np.testing.assert_allclose(both["heads"][1], -delta64(adapter["heads"]), rtol=0, atol=5e-6)


def test_scale_touches_only_the_scales(case: Any, delta64: Any) -> None:
    _, adapter = case
    scaled = jl.scale(adapter, -2.5)
    for name, f in scaled.items():
        assert f.a is adapter[name].a
        assert f.b is adapter[name].b
        assert f.scale.dtype == jnp.float32
        np.testing.assert_allclose(delta64(f), -2.5 * delta64(adapter[name]), rtol=1e-6)
    back = jl.negate(jl.negate(adapter))
    jax.tree.map(np.testing.assert_array_equal, back, adapter)
    params, _ = case
    opposite = jl.merge(params, jl.negate(adapter))
    jax.tree.map(np.testing.assert_array_equal, opposite, jl.unmerge(params, adapter))
    assert not np.array_equal(opposite["matrix"], jl.merge(params, adapter)["matrix"])


def test_the_factor_can_be_trained_and_compiles_once(case: Any, delta64: Any) -> None:
    _, adapter = case
    traces = 0

    @jax.jit
    @jax.value_and_grad
    def loss(factor: Any, adapter: Any) -> Any:
        nonlocal traces
        traces += 1
        return sum((update**2).sum() for update in jl.delta(jl.scale(adapter, factor)).values())

    norm = sum((delta64(f) ** 2).sum() for f in adapter.values())
    for factor in (0.0, 0.5, -3.0):
        value, grad = loss(jnp.float32(factor), adapter)
        np.testing.assert_allclose((value, grad), (factor**2 * norm, 2 * factor * norm), rtol=1e-5)
    assert traces == 1


def test_a_factor_for_each_of_many_adapters(case: Any) -> None:
    _, adapter = case
    many = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), adapter)
    scaled = jl.scale(many, jnp.array([1.0, 0.0, -1.0]))
    np.testing.assert_allclose(scaled["matrix"].scale, [0.7, 0.0, -0.7], rtol=1e-6)
    with pytest.raises(jl.ConfigError, match=r"scalar factor .* of experts last; got shape \(3,\)"):
        jl.scale(adapter, jnp.ones(3))


def test_scale_keeps_a_narrow_dtype(case: Any) -> None:
    _, adapter = case
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), adapter)
    for factor in (2, 0.5, np.float64(0.5), jnp.float32(0.5)):
        assert jl.scale(half, factor)["stack"].scale.dtype == jnp.bfloat16


def test_select_and_drop_are_two_halves(case: Any) -> None:
    params, adapter = case
    chosen, rest = jl.select(adapter, ("m*", "stack")), jl.drop(adapter, ("m*", "stack"))
    assert list(chosen) == ["matrix", "stack"]
    assert sorted([*chosen, *rest]) == list(adapter)
    assert chosen["stack"] is adapter["stack"]
    both = jl.merge(jl.merge(params, chosen), rest)
    jax.tree.map(np.testing.assert_array_equal, both, jl.merge(params, adapter))
    nothing = jl.drop(adapter, "**")
    assert len(nothing) == 0
    jax.tree.map(np.testing.assert_array_equal, jl.merge(params, nothing), params)


@pytest.mark.parametrize("fun", [jl.select, jl.drop])
def test_a_glob_that_matches_nothing_is_named(case: Any, fun: Any) -> None:
    _, adapter = case
    with pytest.raises(jl.TargetError) as error:
        fun(adapter, ["stack", "matrx", "expert"])
    assert "'matrx' (nearest: 'matrix')" in str(error.value)
    assert "'expert' (nearest: 'experts last'" in str(error.value)
    assert "'stack' (" not in str(error.value)


def _small() -> tuple[dict[str, Any], jl.Plan, jl.Adapter]:
    params = {"w": jnp.ones((4, 3))}
    config = jl.LoraConfig(rank=2)
    plan = jl.plan(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)), config=config)
    return params, plan, jl.init(jax.random.key(0), params, plan)


# What is called with parameters, their plan and an adapter; the error and what it says.
MISTAKES: dict[str, Any] = {
    "init without key": (lambda p, q, a: jl.init(None, p, q), "Config", "PRNG key .*NoneType"),
    "init by number": (lambda p, q, a: jl.init(0, p, q), "Config", r"key\(0\), got int"),
    "init by floats": (lambda p, q, a: jl.init(jnp.ones(2), p, q), "Config", r"float32\[2\]"),
    "init by keys": (
        lambda p, q, a: jl.init(jax.random.split(jax.random.key(0), 3), p, q),
        "Config",
        r"an array key<fry>\[3\]",
    ),
    "init of integers": (
        lambda p, q, a: jl.init(jax.random.key(0), {"w": jnp.ones((4, 3), jnp.int32)}, q),
        "Adapter",
        "w: expected floats, found int32",
    ),
    "merge into integers": (
        lambda p, q, a: jl.merge({"w": jnp.ones((4, 3), jnp.int32)}, a),
        "Adapter",
        "w: expected floats, found int32",
    ),
    "merge into a number": (
        lambda p, q, a: jl.merge({"w": 1.0}, a),
        "Adapter",
        r"w: made for shape \(4, 3\), found \(\)",
    ),
    "scale by nothing": (lambda p, q, a: jl.scale(a, None), "Config", "the factor .*got None"),
    "scale by text": (lambda p, q, a: jl.scale(a, "2"), "Config", "the factor .*got '2'"),
    "scale by nan": (lambda p, q, a: jl.scale(a, float("nan")), "Config", "finite real .*nan"),
    "scale by i": (lambda p, q, a: jl.scale(a, 1j), "Config", "real number, got 1j"),
    "select by number": (lambda p, q, a: jl.select(a, 0), "Config", "globs .*got 0"),
    "select by None": (lambda p, q, a: jl.select(a, ["w", None]), "Config", "got None among"),
    "drop by half": (lambda p, q, a: jl.drop(a, "re:("), "Config", r"got 're:\(': missing \)"),
    "select of None": (lambda p, q, a: jl.select(None, "w"), "Adapter", "an adapter .*NoneType"),
    "drop of params": (lambda p, q, a: jl.drop(p, "w"), "Adapter", "an adapter .*got dict"),
    "combine by text": (lambda p, q, a: jl.combine([a], ["1"]), "Config", "weight 0 .*got '1'"),
    "combine by nan": (
        lambda p, q, a: jl.combine([a, a], [1, float("inf")]),
        "Config",
        "weight 1 .*got inf",
    ),
    "combine by a number": (
        lambda p, q, a: jl.combine([a], method="dare", density=0.5, key=3),
        "Config",
        "PRNG key .*got int",
    ),
    "extract by uses": (
        lambda p, q, a: jl.extract(p, p, {"w": q.targets["w"].uses}, rank=1),
        "Adapter",
        "w: expected a Layout .*got tuple",
    ),
    "extract by nothing": (
        lambda p, q, a: jl.extract(p, p, None, rank=1),
        "Adapter",
        "layouts by path, .*got NoneType",
    ),
    "dropout by number": (lambda p, q, a: jl.dropout(a, 1, 0.5), "Config", "PRNG key .*got int"),
    "an adapter of nothing": (lambda p, q, a: jl.Adapter(None), "Adapter", "by path .*NoneType"),
    "an adapter of arrays": (lambda p, q, a: jl.Adapter(p), "Adapter", "an entry for 'w' .*Array"),
    "an adapter of numbers": (
        lambda p, q, a: jl.Adapter({1: a["w"]}),
        "Adapter",
        "the path of a parameter .*got int",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_error_that_says_what_came(name: str) -> None:
    call, kind, text = MISTAKES[name]
    with pytest.raises(getattr(jl, f"{kind}Error"), match=text):
        call(*_small())
