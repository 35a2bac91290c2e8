"""DoRA: norms are detached, cached for inference, and the gain goes wherever the weight goes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_lora as jl


def _linear(p: Any, x: Any) -> Any:
    return x @ p["w"]


def _close(found: Any, want: Any, tol: float = 3e-6) -> None:
    want = np.asarray(want, np.float64)
    np.testing.assert_allclose(found, want, rtol=0, atol=tol * np.abs(want).max())


@pytest.fixture
def linear(normal: Any, started: Any, stirred: Any) -> Any:
    params, x = {"w": normal(6, 4)}, normal(5, 6)
    return params, stirred(started(_linear, params, x, variant="dora")), x


def test_the_start_has_the_norms_of_the_columns(normal: Any, started: Any) -> None:
    layout_of = {
        "w": (normal(6, 4), 0),
        "stack": (normal(3, 6, 4), 1),
        "heads": (normal(6, 2, 3), 0),
    }
    params = {name: w for name, (w, _) in layout_of.items()}

    def fun(p: Any, x: Any) -> Any:
        y = lax.scan(lambda c, w: (c, x @ w), 0, p["stack"])[1]
        return x @ p["w"], y, jnp.einsum("bd,dhk->bhk", x, p["heads"])

    adapter = started(fun, params, normal(5, 6), variant="dora")
    for name, (w, axis) in layout_of.items():
        want = np.linalg.norm(np.asarray(w, np.float64), axis=axis)
        for norm in (adapter[name].magnitude, adapter[name].base_norm):
            _close(norm, want, 2e-7)


def test_the_gradient_is_that_of_the_detached_norm_and_not_the_other(linear: Any, x64: Any) -> None:
    params, adapter, x = linear
    f = adapter["w"]

    def loss(adapter: Any) -> Any:
        return (jl.apply(_linear, strict=True)(params, adapter, x) ** 2).sum()

    grads = jax.jit(jax.grad(loss))(adapter)["w"]
    with x64(True):
        w, v, s = (jnp.asarray(np.asarray(z, np.float64)) for z in (params["w"], x, f.scale))
        parts = [jnp.asarray(np.asarray(z, np.float64)) for z in (f.a, f.b, f.magnitude)]

        def dense(detach: Any) -> Any:
            def of(a: Any, b: Any, m: Any) -> Any:
                new = w + s * a @ b
                return ((v @ (m * new / detach(jnp.linalg.norm(new, axis=0)))) ** 2).sum()

            return [np.asarray(g) for g in jax.grad(of, argnums=(0, 1, 2))(*parts)]

        want, other = dense(lax.stop_gradient), dense(lambda norm: norm)
    for found, value in zip((grads.a, grads.b, grads.magnitude), want, strict=True):
        _close(found, value, 1e-5)
    # Negative control: with a gradient through the norm, a and b have another one.
    for value, wrong in zip(want[:2], other[:2], strict=True):
        assert np.abs(value - wrong).max() > 0.05 * np.abs(value).max()
    _close(want[2], other[2], 1e-12)


def test_a_zero_column_stays_and_has_finite_gradients(
    normal: Any, started: Any, stirred: Any
) -> None:
    params, x = {"w": normal(6, 4).at[:, 2].set(0)}, normal(5, 6)
    fresh = started(_linear, params, x, variant="dora")
    adapted = jl.apply(_linear, strict=True)
    np.testing.assert_array_equal(adapted(params, fresh, x), _linear(params, x))
    np.testing.assert_array_equal(jl.merge(params, fresh)["w"], params["w"])
    grads = jax.grad(lambda a: (adapted(params, a, x) + 1).sum() ** 2)
    for adapter in (fresh, stirred(fresh)):
        for leaf in jax.tree.leaves(grads(adapter)):
            assert np.isfinite(np.asarray(leaf)).all()
    # Off the start it has a norm again, and its magnitude decides: 0 at the start.
    moved = dataclasses.replace(stirred(fresh)["w"], magnitude=fresh["w"].magnitude)
    out = np.asarray(adapted(params, jl.Adapter({"w": moved}), x))
    assert np.abs(out[:, 2]).max() == 0
    # Where W + s a b itself vanishes, the column is 0 and nothing is divided by it.
    one = {"w": jnp.asarray([[1.0, 2.0]])}
    start = started(_linear, one, jnp.ones((1, 1)), variant="dora", rank=1)["w"]
    gone = dataclasses.replace(
        start, a=jnp.ones((1, 1)), b=jnp.asarray([[-1.0, 0.0]]), scale=jnp.float32(1)
    )
    out = adapted(one, jl.Adapter({"w": gone}), jnp.ones((1, 1)))
    np.testing.assert_array_equal(out, [[0.0, 2.0]])


def _dots(jaxpr: Any) -> list[tuple[tuple[int, ...], ...]]:
    """The shapes of the operands of every product in a jaxpr, inner ones too."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found.append(tuple(v.aval.shape for v in eqn.invars))
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += _dots(inner)
    return found


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_cached_norms_are_the_same_and_cost_no_product_with_the_weight(
    init: str, normal: Any, started: Any, stirred: Any
) -> None:
    params, x = {"w": normal(6, 5)}, normal(7, 6)
    adapter = stirred(started(_linear, params, x, variant="dora", init=init))
    adapted = jl.apply(_linear, strict=True)
    cached = jl.cache_norms(params, adapter)
    _close(adapted(params, cached, x), np.asarray(adapted(params, adapter, x)), 2e-7)
    _close(jl.merge(params, cached)["w"], np.asarray(jl.merge(params, adapter)["w"]), 2e-7)

    def with_weight(adapter: Any) -> int:
        jaxpr = jax.make_jaxpr(adapted)(params, adapter, x).jaxpr
        return sum((6, 5) in shapes or (5, 6) in shapes for shapes in _dots(jaxpr))

    assert (with_weight(adapter), with_weight(cached)) == (2, 1)
    # It goes through a compiled function and a tree map like any other, and fits its parameters.
    again = jax.jit(lambda a: a)(cached)
    np.testing.assert_array_equal(again["w"].norm, cached["w"].norm)
    assert cached["w"].problems() == []
    assert cached.trainable_params == adapter.trainable_params


def test_caching_keeps_other_variants_and_refuses_other_parameters(
    normal: Any, started: Any, linear: Any
) -> None:
    params, adapter, _ = linear
    lora = started(_linear, params, normal(5, 6))
    assert jl.cache_norms(params, lora)["w"] is lora["w"]
    with pytest.raises(jl.AdapterError, match=r"made for shape \(6, 4\), found \(4, 6\)"):
        jl.cache_norms({"w": params["w"].T}, adapter)


def _tied(p: Any, ids: Any) -> Any:
    x = p["w"][ids]
    return jnp.tanh(x) @ p["w"].T


def _grouped(p: Any, x: Any) -> Any:
    numbers = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(
        x, p["w"], (2,), "SAME", dimension_numbers=numbers, feature_group_count=2
    )


def _channels_first(p: Any, x: Any) -> Any:
    return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME")


def _ragged(p: Any, x: Any) -> Any:
    return lax.ragged_dot(x, p["w"], jnp.array([1, 0, 3], jnp.int32))  # a row beyond the groups


def _twisted(p: Any, x: Any) -> Any:
    """Both sides of one weight, sliced, scaled, reversed and reshaped."""
    w = -p["w"] * 0.5
    head = jnp.flip(w, 1).reshape(6, 2, 3)[:, 1]
    return x @ head, (x @ w) @ w.T, jnp.einsum("bd,hd->hb", x @ w, w[:2])


def _picked(p: Any, x: Any) -> Any:
    return jnp.einsum("bd,bdf->bf", x, p["w"][jnp.arange(4) % 3])


def _fori(p: Any, x: Any) -> Any:
    def step(i: Any, x: Any) -> Any:
        return jnp.tanh(x @ lax.dynamic_index_in_dim(p["w"], i, 0, keepdims=False))

    return lax.fori_loop(0, 3, step, x)


MODELS = {
    "tied head": (_tied, (9, 4), np.array([3, 0, 8])),
    "grouped convolution": (_grouped, (3, 2, 6), (2, 7, 4)),
    "channels first": (_channels_first, (5, 3, 2, 2), (2, 3, 4, 4)),
    "ragged": (_ragged, (3, 6, 4), (5, 6)),
    "twisted": (_twisted, (6, 6), (5, 6)),
    "picked": (_picked, (3, 6, 4), (4, 6)),
    "loop over layers": (_fori, (3, 6, 6), (4, 6)),
    "one output": (lambda p, x: (x @ p["w"])[:, 0], (6, 1), (5, 6)),
    "input first": (lambda p, x: jnp.einsum("io,bi->ob", p["w"], x), (6, 4), (5, 6)),
    "three axes": (lambda p, x: jnp.einsum("bthk,hkd->btd", x, p["w"]), (2, 3, 5), (2, 4, 2, 3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_wherever_the_weight_goes_the_gain_goes_too(
    name: str, normal: Any, started: Any, stirred: Any, oracle: Any, x64: Any, wide: Any
) -> None:
    fun, shape, x = MODELS[name]
    params = {"w": normal(*shape)}
    x = normal(*x) if isinstance(x, tuple) else jnp.asarray(x)
    fresh = started(fun, params, x, variant="dora", targets="w", rank=1)
    adapter = stirred(fresh)
    adapted = jax.jit(jl.apply(fun, strict=True))
    with jax.disable_jit():  # XLA may sum a product whose result is transposed in another order
        outs = jl.apply(fun, strict=True)(params, fresh, x)
        jax.tree.map(np.testing.assert_array_equal, outs, fun(params, x))
    new = oracle(adapter, params)[0]["w"]
    with x64(True):
        y = jnp.asarray(wide(x))
        want = jax.tree.map(np.asarray, fun({"w": jnp.asarray(new)}, y))
        without = jax.tree.map(
            np.asarray, fun({"w": jnp.asarray(_without_gain(adapter["w"], params["w"]))}, y)
        )
    got = adapted(params, adapter, x)
    for found, value, other in zip(*map(jax.tree.leaves, (got, want, without)), strict=True):
        _close(found, value, 5e-6)
        assert np.abs(value - other).max() > 0.02 * np.abs(value).max()  # negative control


def _without_gain(entry: Any, w: Any) -> np.ndarray:
    """``W + s a b``: what forgetting the gain would make of it."""
    plain = jl.LoraFactors(entry.a, entry.b, entry.scale, entry.layout)
    return np.asarray(jl.merge({"w": w}, jl.Adapter({"w": plain}))["w"], np.float64)


def test_where_the_gain_cannot_follow_the_weight_is_formed_and_right(
    normal: Any, started: Any, stirred: Any, oracle: Any
) -> None:
    """One product that contracts one of the gain's axes and keeps the other."""

    def fun(p: Any, x: Any) -> Any:
        return jnp.einsum("bd,dhk->bhk", x, p["w"]), jnp.einsum("dhk,bh->bdk", p["w"], x[:, :2])

    params, x = {"w": normal(6, 2, 3)}, normal(5, 6)
    config = jl.LoraConfig(rank=2, variant="dora", targets="w")
    assert jl.plan(fun, params, x, config=config).targets["w"].materialized == ("dot_general",)
    adapter = stirred(started(fun, params, x, variant="dora", targets="w"))
    new = oracle(adapter, params)[0]["w"]
    got = jl.apply(fun)(params, adapter, x)
    _close(got[1], np.einsum("dhk,bh->bdk", new, np.asarray(x, np.float64)[:, :2]))
    with pytest.raises(jl.MaterializeError):
        jl.apply(fun, strict=True)(params, adapter, x)


def test_under_vmap_over_adapters(linear: Any, stirred: Any, oracle: Any) -> None:
    params, adapter, x = linear
    adapters = [stirred(adapter, seed=k) for k in range(3)]
    many = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    batched = jax.vmap(jl.apply(_linear, strict=True), in_axes=(None, 0, None))
    for out, one in zip(jax.jit(batched)(params, many, x), adapters, strict=True):
        _close(out, np.asarray(x, np.float64) @ oracle(one, params)[0]["w"])


def test_merging_bfloat16_rounds_once_whatever_the_factors(
    normal: Any, started: Any, stirred: Any, oracle: Any
) -> None:
    """The magnitudes are float32 beside factors in bfloat16, and so is the product with them."""
    params, x = {"w": normal(64, 48).astype(jnp.bfloat16)}, normal(5, 64).astype(jnp.bfloat16)
    fresh = started(_linear, params, x, variant="dora", dtype="bfloat16")
    assert (fresh["w"].a.dtype, fresh["w"].magnitude.dtype) == (jnp.bfloat16, jnp.float32)
    entry = dataclasses.replace(fresh["w"], magnitude=fresh["w"].magnitude * 1.3137)
    adapter = jl.Adapter({"w": entry})  # b is zero: the magnitudes alone
    merged = jl.merge(params, adapter)["w"]
    new = oracle(adapter, params)[0]["w"]
    assert (np.abs(np.asarray(merged, np.float64) - new) <= 1.001 * 2.0**-8 * np.abs(new)).all()
    exact = np.asarray(merged) == np.asarray(jnp.asarray(new, jnp.float32).astype(jnp.bfloat16))
    assert exact.mean() > 0.99  # rounded twice, a fifth would differ


def test_the_base_s_gradient_has_the_gain(linear: Any, x64: Any) -> None:
    """``dL/dW = G g`` with the norm detached, for whoever trains both."""
    params, adapter, x = linear
    g = np.random.default_rng(0).normal(size=(5, 4))
    adapted = jl.apply(_linear, strict=True)
    got = jax.grad(lambda p: (adapted(p, adapter, x) * jnp.float32(g)).sum())(params)["w"]
    f = adapter["w"]
    w, a, b, m, x = (np.asarray(v, np.float64) for v in (params["w"], f.a, f.b, f.magnitude, x))
    gain = m / np.linalg.norm(w + float(f.scale) * a @ b, axis=0)
    _close(got, x.T @ g * gain)


def test_what_a_plan_says_it_costs(normal: Any) -> None:
    """In each evaluation ``rank`` rows times W, beside the rows of the input."""
    params, x = {"w": normal(6, 4)}, normal(5, 6)
    cost = {}
    for variant in ("lora", "dora"):
        config = jl.LoraConfig(rank=2, variant=variant)
        cost[variant] = jl.plan(_linear, params, x, config=config).extra_multiply_adds("w")
    assert cost == {"lora": 5 * 2 * (6 + 4), "dora": 5 * 2 * (6 + 4) + 2 * 6 * 4}
