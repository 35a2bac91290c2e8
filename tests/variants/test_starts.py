"""PiSSA and OLoRA start from the weight, and leave it and other adapters alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl


def _linear(p: Any, x: Any) -> Any:
    return x @ p["w"]


def _stack(p: Any, x: Any) -> Any:
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w.T), None), x, p["w"])[0]


SHAPES = [
    ("linear", (6, 4), 2),
    ("linear", (4, 6), 3),
    ("linear", (6, 4), 9),
    ("stack", (3, 5, 5), 2),
]


def _product(entry: Any) -> np.ndarray:
    """``s a b`` as ``[stack, in, out]``."""
    a, b = np.asarray(entry.a, np.float64), np.asarray(entry.b, np.float64)
    return float(entry.scale) * a @ b


def _matrices(name: str, w: Any) -> np.ndarray:
    w = np.asarray(w, np.float64)
    return w.swapaxes(-1, -2) if name == "stack" else w


def _entry(name: str, shape: Any, rank: int, init: str, normal: Any, started: Any) -> Any:
    """The parameters and the entry of ``w``; beside it is a weight that has the rank."""
    fun = {"linear": _linear, "stack": _stack}[name]
    params = {"v": normal(12, 12), "w": normal(*shape)}

    def model(p: Any, x: Any) -> Any:
        return fun(p, x), jnp.ones((1, 12)) @ p["v"]

    x = normal(7, shape[-2] if name == "linear" else shape[-1])
    return params, started(model, params, x, rank=rank, init=init)["w"]


@pytest.mark.parametrize(("name", "shape", "rank"), SHAPES)
def test_pissa_starts_at_the_best_approximation(
    name: str, shape: Any, rank: int, normal: Any, started: Any
) -> None:
    """``s a b = U_r S_r V_r^T``, both halves of one size; what is above min(in, out) is zero."""
    params, entry = _entry(name, shape, rank, "pissa", normal, started)
    w = _matrices(name, params["w"])
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    want = (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]
    np.testing.assert_allclose(_product(entry), want, rtol=0, atol=3e-6 * s.max())
    a, b = np.asarray(entry.a), np.asarray(entry.b)
    k = min(rank, *w.shape[-2:])
    root = np.sqrt(s[..., :k] / float(entry.scale))
    np.testing.assert_allclose(np.linalg.norm(a[..., :k], axis=-2), root, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(b[..., :k, :], axis=-1), root, rtol=1e-5)
    assert not a[..., k:].any()
    assert not b[..., k:, :].any()
    np.testing.assert_array_equal(entry.a0, entry.a)
    np.testing.assert_array_equal(entry.b0, entry.b)


@pytest.mark.parametrize(("name", "shape", "rank"), SHAPES)
def test_olora_starts_at_parts_of_the_qr_decomposition(
    name: str, shape: Any, rank: int, normal: Any, started: Any
) -> None:
    """With ``W^T = Q R``: ``a b = (Q_r R_r)^T``, the projection of W on ``Q_r``."""
    params, entry = _entry(name, shape, rank, "olora", normal, started)
    w = _matrices(name, params["w"])
    q, r = np.linalg.qr(w.swapaxes(-1, -2))
    want = (q[..., :rank] @ r[..., :rank, :]).swapaxes(-1, -2)
    got = _product(entry) / float(entry.scale)
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-6 * np.abs(w).max())
    k = min(rank, *w.shape[-2:])
    b = np.asarray(entry.b, np.float64)[..., :k, :]
    eye = np.broadcast_to(np.eye(k), (*b.shape[:-2], k, k))
    np.testing.assert_allclose(b @ b.swapaxes(-1, -2), eye, rtol=0, atol=2e-6)
    assert not np.asarray(entry.a)[..., k:].any()


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("factor", ["float32", "bfloat16"])
@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_identity_is_exact_whatever_is_rounded(
    init: str, factor: str, base: str, normal: Any, started: Any
) -> None:
    """``(a - a0) b + a0 (b - b0)`` is zero however a and b are rounded."""
    params = {"w": normal(32, 24).astype(base)}
    x = normal(5, 32).astype(base)
    adapter = started(_linear, params, x, init=init, rank=8, dtype=factor)
    got = jax.jit(jl.apply(_linear, strict=True))(params, adapter, x)
    np.testing.assert_array_equal(got, jax.jit(_linear)(params, x))
    np.testing.assert_array_equal(jl.merge(params, adapter)["w"], params["w"])
    assert not np.asarray(jl.delta(adapter)["w"]).any()
    assert adapter["w"].a.dtype == factor


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_base_and_other_adapters_stay_what_they_are(
    init: str, normal: Any, started: Any, stirred: Any, oracle: Any
) -> None:
    """PEFT subtracts the start from the base, which changes what all other adapters do."""
    params, x = {"w": normal(6, 4)}, normal(5, 6)
    before = np.array(params["w"])
    other = stirred(started(_linear, params, x))
    adapted = jl.apply(_linear, strict=True)
    out = np.asarray(adapted(params, other, x))
    mine = stirred(started(_linear, params, x, init=init))
    jax.grad(lambda a: (adapted(params, a, x) ** 2).sum())(mine)
    jl.merge(params, mine)
    np.testing.assert_array_equal(params["w"], before)
    np.testing.assert_array_equal(adapted(params, other, x), out)
    # Both together are the sum of their updates.
    both = jl.combine([mine, other]).adapter
    w = before.astype(np.float64)
    want = sum(oracle(a, params)[0]["w"] - w for a in (mine, other))
    np.testing.assert_allclose(jl.delta(both)["w"], want, rtol=0, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_small_step_is_not_lost_beside_large_factors(
    init: str, normal: Any, started: Any, oracle: Any
) -> None:
    """The update after a step of 1e-4 is right to 1e-5 of itself, not of the weight."""
    params, x = {"w": 30 * normal(6, 4)}, normal(5, 6)
    adapter = started(_linear, params, x, init=init)
    f = adapter["w"]
    step = functools.partial(jnp.multiply, jnp.float32(1 + 2.0**-13))
    moved = jl.Adapter({"w": dataclasses.replace(f, a=step(f.a), b=step(f.b))})
    want = oracle(moved, params)[0]["w"] - np.asarray(params["w"], np.float64)
    got = np.asarray(jl.delta(moved)["w"], np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())
    naive = np.asarray(moved["w"].a @ moved["w"].b - f.a @ f.b) * float(f.scale)
    assert np.abs(naive - want).max() > 1e-4 * np.abs(want).max()  # negative control


def test_no_two_leaves_share_a_buffer(normal: Any) -> None:
    params, x = {"w": normal(6, 4)}, normal(5, 6)
    plan = jl.plan(_linear, params, x, config=jl.LoraConfig(rank=2, init="pissa", variant="dora"))
    adapter = jl.init(jax.random.key(0), params, plan)
    step = jax.jit(lambda a: jax.tree.map(lambda leaf: leaf + 1, a), donate_argnums=0)
    step(adapter)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(adapter))
    assert not params["w"].is_deleted()
