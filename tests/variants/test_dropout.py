"""Dropout: explicit keys, the masks of `jax.random`, and nothing without them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_lora as jl
from jax_lora.adapter import param_key

RATE = 0.4


def _linear(p: Any, x: Any) -> Any:
    return x @ p["w"]


def _mask(key: Any, path: str, shape: Any, *, use: int = 1, layer: int = 0, count: int = 1) -> Any:
    """What multiplies the input: 0, or ``1 / (1 - RATE)``."""
    key = jax.random.split(param_key(key, path), count)[layer]
    kept = jax.random.bernoulli(jax.random.fold_in(key, use), 1 - RATE, shape)
    return np.where(np.asarray(kept), 1 / (1 - RATE), 0.0)


def _linear64(params: Any, adapter: Any, x: Any, mask: Any, path: str = "w") -> np.ndarray:
    """``x W + s ((mask x) a) b`` in float64."""
    f = adapter[path]
    w, a, b, x = (np.asarray(v, np.float64) for v in (params[path], f.a, f.b, x))
    return x @ w + float(f.scale) * (mask * x) @ a @ b


@pytest.fixture
def linear(normal: Any, started: Any, stirred: Any) -> Any:
    params, x = {"w": normal(6, 4)}, normal(5, 6)
    return params, stirred(started(_linear, params, x)), x


def _close(found: Any, want: Any, tol: float = 2e-6) -> None:
    want = np.asarray(want, np.float64)
    np.testing.assert_allclose(found, want, rtol=0, atol=tol * np.abs(want).max())


def test_it_is_the_formula_with_the_masks_of_the_key(linear: Any) -> None:
    params, adapter, x = linear
    key = jax.random.key(3)
    mask = _mask(key, "w", x.shape)
    assert 0 < (mask == 0).sum() < mask.size
    out = jl.apply(_linear, strict=True)(params, jl.dropout(adapter, key, RATE), x)
    _close(out, _linear64(params, adapter, x, mask))
    # Negative control: other masks, or none, are another number.
    for other in (_mask(key, "w", x.shape, use=2), np.ones(x.shape)):
        assert np.abs(_linear64(params, adapter, x, other) - np.asarray(out)).max() > 0.1


def test_the_gradient_is_that_of_the_formula(linear: Any) -> None:
    """With ``G = dL/dy``: ``da = s (m x)^T G b^T``, ``db = s (m x a)^T G``, ``dx`` has the mask."""
    params, adapter, x = linear
    key = jax.random.key(3)
    g = np.random.default_rng(0).normal(size=(5, 4))

    @jax.jit
    def gradient(adapter: Any, x: Any, key: Any) -> Any:
        def loss(adapter: Any, x: Any) -> Any:
            dropped = jl.dropout(adapter, key, RATE)
            return (jl.apply(_linear, strict=True)(params, dropped, x) * jnp.float32(g)).sum()

        return jax.grad(loss, argnums=(0, 1))(adapter, x)

    grads, dx = gradient(adapter, x, key)
    assert jax.tree.structure(grads) == jax.tree.structure(adapter)
    f, mask = adapter["w"], _mask(key, "w", x.shape)
    w, a, b, x = (np.asarray(v, np.float64) for v in (params["w"], f.a, f.b, x))
    s = float(f.scale)
    _close(grads["w"].a, s * (mask * x).T @ g @ b.T)
    _close(grads["w"].b, s * (mask * x @ a).T @ g)
    _close(dx, g @ w.T + s * mask * (g @ b.T @ a.T))


def test_rate_zero_and_no_call_are_exact(linear: Any) -> None:
    params, adapter, x = linear
    adapted = jl.apply(_linear)
    plain = adapted(params, adapter, x)
    off = jl.dropout(adapter, jax.random.key(0), 0.0)
    assert off["w"] is adapter["w"]
    np.testing.assert_array_equal(adapted(params, off, x), plain)
    unnamed = jl.dropout(adapter, jax.random.key(0), {})
    assert unnamed["w"] is adapter["w"]
    _close(plain, _linear64(params, adapter, x, np.ones(x.shape)))
    # At the start it does nothing either: b is zero.
    fresh = jl.Adapter({"w": dataclasses.replace(adapter["w"], b=jnp.zeros((2, 4)))})
    dropped = jl.dropout(fresh, jax.random.key(0), 0.9)
    np.testing.assert_array_equal(adapted(params, dropped, x), _linear(params, x))


def test_it_is_unbiased(normal: Any) -> None:
    """Of n elements of value 1: the mean is 1 and the variance ``rate / (1 - rate)``."""
    layout = jl.Layout((1, 1), (0,), (1,))
    one = jl.LoraFactors(jnp.ones((1, 1)), jnp.ones((1, 1)), jnp.float32(1), layout)
    params, n = {"w": jnp.zeros((1, 1))}, 40_000
    adapter = jl.dropout(jl.Adapter({"w": one}), jax.random.key(1), RATE)
    out = np.asarray(jl.apply(_linear)(params, adapter, jnp.ones((n, 1))), np.float64)
    assert set(np.unique(out)) == {0.0, float(np.float32(1) / np.float32(1 - RATE))}
    deviation = math.sqrt(RATE / (1 - RATE) / n)
    assert abs(out.mean() - 1) < 5 * deviation
    # The variance of n squares (out - 1)^2, each (r/(1-r))^2 or 1: within 5 of its deviations.
    big, small = (RATE / (1 - RATE)) ** 2, 1.0
    spread = math.sqrt(RATE * (1 - RATE) / n) * abs(big - small)
    assert abs(((out - 1) ** 2).mean() - RATE / (1 - RATE)) < 5 * spread


def test_keys_differ_by_path_and_are_those_of_the_path_alone(
    normal: Any, started: Any, stirred: Any
) -> None:
    def both(p: Any, x: Any) -> Any:
        return x @ p["w"], x @ p["v"]

    params, x, key = {"w": normal(6, 4), "v": normal(6, 4)}, normal(5, 6), jax.random.key(3)
    adapter = stirred(started(both, params, x))
    adapted = jl.apply(both, strict=True)
    for path, out in zip(
        ("w", "v"), adapted(params, jl.dropout(adapter, key, RATE), x), strict=True
    ):
        _close(out, _linear64(params, adapter, x, _mask(key, path, x.shape), path))
    assert (_mask(key, "w", x.shape) != _mask(key, "v", x.shape)).any()
    # Rates by path, such as those of a plan: the other weight has none.
    named = adapted(params, jl.dropout(adapter, key, {"v": RATE}), x)
    _close(named[0], _linear64(params, adapter, x, np.ones(x.shape), "w"))
    _close(named[1], _linear64(params, adapter, x, _mask(key, "v", x.shape), "v"))


def test_each_use_has_its_mask_also_through_one_inner_function(linear: Any) -> None:
    params, adapter, x = linear
    layer = jax.jit(lambda x, w: x @ w)

    def twice(p: Any, x: Any) -> Any:
        return layer(x, p["w"]), layer(x, p["w"]), x @ p["w"]

    key = jax.random.key(3)
    outs = jl.apply(twice, strict=True)(params, jl.dropout(adapter, key, RATE), x)
    for use, out in enumerate(outs, start=1):
        _close(out, _linear64(params, adapter, x, _mask(key, "w", x.shape, use=use)))


def test_the_same_key_is_the_same_result_and_raw_keys_are_keys(linear: Any) -> None:
    params, adapter, x = linear
    run = jax.jit(lambda key: jl.apply(_linear)(params, jl.dropout(adapter, key, RATE), x))
    out = run(jax.random.key(3))
    np.testing.assert_array_equal(run(jax.random.key(3)), out)
    np.testing.assert_array_equal(run(jax.random.PRNGKey(3)), out)
    assert (np.asarray(run(jax.random.key(4))) != np.asarray(out)).any()
    # Another generator keeps its kind.
    other = jax.random.key(3, impl="rbg")
    assert np.isfinite(np.asarray(run(other))).all()
    assert (np.asarray(run(other)) != np.asarray(out)).any()


def test_each_layer_of_a_scan_has_its_mask_and_remat_draws_the_same(
    normal: Any, started: Any, stirred: Any
) -> None:
    params, x, key = {"w": normal(3, 6, 6) / 3}, normal(5, 6), jax.random.key(3)

    def scanned(wrap: Any) -> Any:
        layer = wrap(lambda x, w: (jnp.tanh(x @ w), None))
        return lambda p, x: lax.scan(layer, x, p["w"])[0]

    adapter = stirred(started(scanned(lambda f: f), params, x))

    def loss(fun: Any) -> Any:
        adapted = jl.apply(fun, strict=True)

        def of(adapter: Any, x: Any) -> Any:
            out = adapted(params, jl.dropout(adapter, key, RATE), x)
            return (out**2).sum(), out

        return jax.jit(jax.grad(of, has_aux=True))

    grads, out = loss(scanned(lambda f: f))(adapter, x)
    again, same = loss(scanned(jax.checkpoint))(adapter, x)
    jax.tree.map(lambda u, v: _close(u, v), (again, same), (grads, out))

    def by_hand(adapter: Any, x: Any) -> Any:
        f = adapter["w"]
        for k in range(3):
            mask = jnp.asarray(_mask(key, "w", x.shape, layer=k, count=3), x.dtype)
            x = jnp.tanh(x @ params["w"][k] + f.scale * ((mask * x) @ f.a[k]) @ f.b[k])
        return (x**2).sum(), x

    want_grads, want = jax.grad(by_hand, has_aux=True)(adapter, x)
    _close(out, want, 5e-6)
    jax.tree.map(lambda u, v: _close(u, v, 2e-5), grads, want_grads)


def test_experts_have_masks_of_their_own(normal: Any, started: Any, stirred: Any) -> None:
    params, x, key = {"w": normal(3, 6, 4)}, normal(3, 5, 6), jax.random.key(3)
    x = jnp.broadcast_to(x[:1], x.shape)

    def experts(p: Any, x: Any) -> Any:
        return jnp.einsum("ebd,edf->ebf", x, p["w"])

    adapter = stirred(started(experts, params, x))
    f = adapter["w"]
    alike = jl.Adapter(
        {"w": dataclasses.replace(f, a=jnp.stack([f.a[0]] * 3), b=jnp.stack([f.b[0]] * 3))}
    )
    params = {"w": jnp.zeros((3, 6, 4))}
    outs = np.asarray(jl.apply(experts, strict=True)(params, jl.dropout(alike, key, RATE), x))
    assert (outs[0] != outs[1]).any()
    assert (outs[1] != outs[2]).any()
    plain = np.asarray(jl.apply(experts)(params, alike, x))
    np.testing.assert_array_equal(plain[0], plain[1])  # negative control


def test_under_vmap_over_adapters_and_inputs(linear: Any, stirred: Any) -> None:
    params, adapter, x = linear
    many = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(stirred(adapter, seed=k) for k in range(3))
    )
    keys = jax.random.split(jax.random.key(3), 3)

    def one(adapter: Any, key: Any) -> Any:
        return jl.apply(_linear, strict=True)(params, jl.dropout(adapter, key, RATE), x)

    outs = jax.jit(jax.vmap(one))(many, keys)
    for k in range(3):
        alone = jax.tree.map(lambda leaf, k=k: leaf[k], many)
        _close(outs[k], _linear64(params, alone, x, _mask(keys[k], "w", x.shape)))


@pytest.mark.parametrize("variant", ["lora-fa", "vera", "loha", "lokr", "dora"])
def test_other_variants_drop_the_input_of_their_update_alone(
    variant: str, normal: Any, started: Any, stirred: Any, oracle: Any
) -> None:
    """``x W g + (m x) (W' - W g)`` where ``g`` is 1 for all but DoRA."""
    params, x, key = {"w": normal(6, 4)}, normal(5, 6), jax.random.key(3)
    adapter = stirred(started(_linear, params, x, variant=variant))
    out = jl.apply(_linear, strict=True)(params, jl.dropout(adapter, key, RATE), x)
    new, wide, w = (
        oracle(adapter, params)[0]["w"],
        *(np.asarray(v, np.float64) for v in (x, params["w"])),
    )
    if variant == "dora":
        f = adapter["w"]
        a, b = np.asarray(f.a, np.float64), np.asarray(f.b, np.float64)
        norm = np.linalg.norm(w + float(f.scale) * a @ b, axis=0)
        w = w * np.asarray(f.magnitude, np.float64) / norm
    _close(out, wide @ w + (_mask(key, "w", x.shape) * wide) @ (new - w))


def test_convolutions_and_ragged_products(normal: Any, started: Any, stirred: Any) -> None:
    def conv(p: Any, x: Any) -> Any:
        numbers = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(x, p["w"], (1,), "VALID", dimension_numbers=numbers)

    def ragged(p: Any, x: Any) -> Any:
        return lax.ragged_dot(x, p["w"], jnp.array([2, 0, 3], jnp.int32))

    key = jax.random.key(3)
    for fun, shape, x, count in (
        (conv, (3, 4, 5), normal(2, 7, 4), 1),
        (ragged, (3, 4, 5), normal(5, 4), 3),
    ):
        params = {"w": jnp.zeros(shape)}
        adapter = stirred(started(fun, params, x, targets="w"))
        out = jl.apply(fun, strict=True)(params, jl.dropout(adapter, key, RATE), x)
        mask = _mask(key, "w", x.shape, count=count)
        want = fun(jl.merge(params, adapter), jnp.asarray(mask, x.dtype) * x)
        _close(out, want, 5e-6)


def test_bfloat16_stays_bfloat16(linear: Any) -> None:
    params, adapter, x = linear
    params, x = {"w": params["w"].astype(jnp.bfloat16)}, x.astype(jnp.bfloat16)
    out = jl.apply(_linear, strict=True)(params, jl.dropout(adapter, jax.random.key(3), RATE), x)
    assert out.dtype == jnp.bfloat16
    want = _linear64(params, adapter, x, _mask(jax.random.key(3), "w", x.shape))
    _close(out.astype(jnp.float32), want, 4 * 2.0**-8)


class TestRefusals:
    def test_where_a_weight_is_formed(self, linear: Any) -> None:
        params, adapter, x = linear
        dropped = jl.dropout(adapter, jax.random.key(0), RATE)
        with pytest.raises(jl.MaterializeError, match=r"w: .* reaches `tanh`.*dropout 0"):
            jl.apply(lambda p, x: x @ jnp.tanh(p["w"]))(params, dropped, x)

    def test_in_the_algebra_and_in_checkpoints(self, linear: Any, tmp_path: Path) -> None:
        params, adapter, _ = linear
        dropped = jl.dropout(adapter, jax.random.key(0), RATE)
        for use in (
            lambda a: jl.merge(params, a),
            lambda a: jl.unmerge(params, a),
            jl.delta,
            lambda a: jl.delta(a, params),
            lambda a: jl.scale(a, 2.0),
            jl.negate,
            lambda a: jl.combine([adapter, a]),
            lambda a: jl.resize(a, 1),
            lambda a: jl.cache_norms(params, a),
            lambda a: jl.dropout(a, jax.random.key(1), RATE),
        ):
            with pytest.raises(jl.AdapterError, match="rank 2 with dropout at w; use the adapter"):
                use(dropped)
        with pytest.raises(jl.CheckpointError, match="such as with dropout: w"):
            jl.io.save_adapter(tmp_path / "dropped", dropped)
        with pytest.raises(jl.AdapterError, match="nothing to train"):
            jl.optim.labels(dropped)

    @pytest.mark.parametrize("rate", [-0.1, 1, 1.5, float("nan"), "0.1", True, None])
    def test_rates(self, rate: Any, linear: Any) -> None:
        for rates in (rate, {"w": rate}):
            with pytest.raises(jl.ConfigError, match=r"w: expected a rate of dropout in \[0, 1\)"):
                jl.dropout(linear[1], jax.random.key(0), rates)

    def test_numpy_s_numbers_are_rates(self, linear: Any) -> None:
        dropped = jl.dropout(linear[1], jax.random.key(0), np.float32(0.25))
        assert dropped["w"].rate == 0.25

    def test_a_path_that_is_not_adapted(self, linear: Any) -> None:
        with pytest.raises(jl.ConfigError, match=r"others: 'v' \(.*'w'"):
            jl.dropout(linear[1], jax.random.key(0), {"v": 0.1})

    @pytest.mark.parametrize("key", [None, 0, "key"])
    def test_no_key(self, key: Any, linear: Any) -> None:
        with pytest.raises(jl.ConfigError, match="expected a JAX PRNG key"):
            jl.dropout(linear[1], key, 0.1)


def test_what_is_trained_whole_has_none(normal: Any, started: Any) -> None:
    def tied(p: Any, ids: Any) -> Any:
        return (p["table"][ids] + p["bias"]) @ p["table"].T

    params, ids = {"table": normal(7, 4), "bias": normal(4)}, jnp.arange(3)
    targets = (jl.Rule("table", rows=(1, 2)), jl.Rule("bias", variant="full"))
    adapter = started(tied, params, ids, targets=targets, dropout=0.5)
    dropped = jl.dropout(adapter, jax.random.key(0), 0.5)
    assert all(dropped[path] is adapter[path] for path in adapter)
    for path in adapter:
        assert jl.dropout(adapter, jax.random.key(0), {path: 0.0})[path] is adapter[path]
        with pytest.raises(jl.ConfigError, match=f"{path}: expected no dropout for"):
            jl.dropout(adapter, jax.random.key(0), {path: 0.5})


def test_a_plan_has_the_rates(normal: Any) -> None:
    params, x = {"w": normal(6, 4), "v": normal(4, 4)}, normal(5, 6)
    config = jl.LoraConfig(rank=2, dropout=0.1, targets=(jl.Rule("v", dropout=0.0), "w"))
    plan = jl.plan(lambda p, x: x @ p["w"] @ p["v"], params, x, config=config)
    assert plan.dropout == {"w": 0.1}
