"""Equinox: a model is a pytree; its arrays are the parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

eqx = pytest.importorskip("equinox")
KEY = jax.random.key(0)
# XLA absorbs the transpose after the base's product `W x` by swapping its operands, which it cannot
# do after the adapted sum. Since jaxlib 0.12, YNNPACK adds in another order when they are swapped.
EXACT = jax.__version_info__ < (0, 12)


def _split(model: Any, call: Any = None) -> tuple[Any, Any]:
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def fun(params: Any, x: Any) -> Any:
        return jax.vmap(call or (lambda model, x: model(x)), in_axes=(None, 0))(
            eqx.combine(params, static), x
        )

    return fun, params


def test_mlp(normal: Any, check_model: Any, factored: Any) -> None:
    fun, params = _split(eqx.nn.MLP(6, 5, 8, 2, key=KEY))
    sites = factored(*(f"layers/{k}/weight" for k in range(3)))
    check_model(fun, params, normal(4, 6), sites=sites, exact=EXACT)


def test_static_leaves_may_stay_in_the_tree(normal: Any, planned: Any, dense64: Any) -> None:
    """Activation functions and sizes are leaves that are no arrays: they pass through."""
    import jax_lora as jl

    model, x = eqx.nn.MLP(6, 5, 8, 2, key=KEY), normal(6)
    adapter = planned(lambda model, x: model(x), model, x)
    assert len(adapter) == 3
    got = jl.apply(lambda model, x: model(x), strict=True)(model, adapter, x)
    merged = jl.merge(model, adapter)
    np.testing.assert_allclose(got, merged(x), rtol=0, atol=1e-4)
    assert not np.allclose(got, model(x))


def test_attention(normal: Any, check_model: Any, factored: Any) -> None:
    fun, params = _split(eqx.nn.MultiheadAttention(2, 8, key=KEY), lambda model, x: model(x, x, x))
    names = ("key", "output", "query", "value")
    sites = factored(*(f"{name}_proj/weight" for name in names))
    check_model(fun, params, normal(3, 5, 8), sites=sites)


def test_convolution_and_embedding(normal: Any, check_model: Any, factored: Any) -> None:
    class Model(eqx.Module):
        embedding: Any
        conv: Any

        def __call__(self, ids: Any) -> Any:
            return self.conv(jax.vmap(self.embedding)(ids).T)

    first, second = jax.random.split(KEY)
    model = Model(eqx.nn.Embedding(9, 4, key=first), eqx.nn.Conv1d(4, 3, 3, key=second))
    fun, params = _split(model)
    ids = jnp.asarray([[3, 0, 8, 8, 1], [7, 1, 2, 0, 3]])
    check_model(fun, params, ids, sites=factored("conv/weight", "embedding/weight"))


def test_recurrent_cell(normal: Any, check_model: Any, factored: Any) -> None:
    def unroll(cell: Any, xs: Any) -> Any:
        state = jnp.zeros(4, xs.dtype)
        return jax.lax.scan(lambda state, x: (cell(x, state), None), state, xs)[0]

    fun, params = _split(eqx.nn.GRUCell(3, 4, key=KEY), unroll)
    sites = factored("weight_hh", "weight_ih")
    check_model(fun, params, normal(2, 5, 3), sites=sites, exact=EXACT)
