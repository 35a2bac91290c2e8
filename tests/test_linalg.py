"""Decompositions of stacks: those of each matrix, and on a CPU one after another."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora import linalg

STACK = (3, 2)


@pytest.fixture(scope="module")
def matrices() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (*STACK, 7, 4))


def decomposed(fun: Callable[..., Any], *args: Any) -> list[tuple[int, ...]]:
    """The shape of what each call of LAPACK returns first."""
    text = jax.jit(fun).lower(*args).compile().as_text()
    found = re.findall(r"= \(\w+\[([\d,]*)\][^\n]*custom_call_target=\"lapack", text)
    return [tuple(map(int, shape.split(","))) for shape in found]


def test_each_decomposition_is_that_of_the_matrix(matrices):
    q, r = linalg.qr(matrices)
    u, s, vt = linalg.svd(matrices)
    gram = matrices.mT @ matrices
    values, vectors = linalg.eigh(gram)
    assert (q.shape, r.shape) == ((*STACK, 7, 4), (*STACK, 4, 4))
    assert (u.shape, s.shape, vt.shape) == ((*STACK, 7, 4), (*STACK, 4), (*STACK, 4, 4))
    np.testing.assert_allclose(q @ r, matrices, rtol=0, atol=3e-6)
    np.testing.assert_allclose(u * s[..., None, :] @ vt, matrices, rtol=0, atol=3e-6)
    exact = np.linalg.svd(np.asarray(matrices, np.float64), compute_uv=False)
    np.testing.assert_allclose(s, exact, rtol=3e-6)
    np.testing.assert_allclose(linalg.singular_values(matrices), exact, rtol=3e-6)
    np.testing.assert_allclose(values, exact[..., ::-1] ** 2, rtol=1e-4)
    np.testing.assert_allclose(gram @ vectors, vectors * values[..., None, :], rtol=0, atol=3e-5)


def test_a_gradient_flows_through_a_stack(matrices):
    """The derivative of the sum of all squared singular values is 2 X."""
    grads = jax.grad(lambda x: (linalg.svd(x)[1] ** 2).sum())(matrices)
    np.testing.assert_allclose(grads, 2 * matrices, rtol=0, atol=2e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="LAPACK is what CPUs call")
def test_no_stack_is_decomposed_at_once_on_a_cpu(matrices):
    """Two of them in one program can wait for each other for ever."""
    for fun in (linalg.qr, linalg.svd, linalg.singular_values, lambda x: linalg.eigh(x.mT @ x)):
        assert {len(shape) for shape in decomposed(fun, matrices)} == {2}
    assert {len(shape) for shape in decomposed(jnp.linalg.qr, matrices)} == {2 + len(STACK)}

    params = {"one": jnp.ones((3, 8, 6)), "two": jnp.ones((3, 6, 8))}

    def scanned(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (x @ w[0] @ w[1], None), x, (p["one"], p["two"]))[0]

    key = jax.random.key(0)
    for init in ("orthogonal", "pissa", "olora"):
        config = jl.LoraConfig(rank=4, init=init, targets="*")
        plan = jl.plan(scanned, params, jnp.ones((2, 8)), config=config)
        shapes = decomposed(lambda p, plan=plan: jl.init(key, p, plan), params)
        assert {len(shape) for shape in shapes} == {2}
    adapter = jl.init(key, params, plan)
    assert {len(shape) for shape in decomposed(lambda a: jl.resize(a, 2).adapter, adapter)} == {2}
