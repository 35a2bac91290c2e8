"""The virtual weight: its labels, and what it is when it is formed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.adapter import RANK
from jax_lora.virtual import LoraWeight, virtual_weight, wider

LAYOUTS = [
    jl.Layout((6, 4), (0,), (1,)),
    jl.Layout((6, 4), (1,), (0,)),
    jl.Layout((3, 6, 4), (1,), (2,), (0,)),
    jl.Layout((6, 4, 3), (1,), (0,), (2,)),
    jl.Layout((2, 3, 4, 2), (3, 0), (1,), (2,)),
]


def _factors(layout: jl.Layout, normal: Any, dtype: Any = jnp.float32) -> jl.LoraFactors:
    a, b = normal(*layout.a_shape(2)), normal(*layout.b_shape(2))
    return jl.LoraFactors(a.astype(dtype), b.astype(dtype), jnp.float32(0.75), layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_formed_it_is_the_dense_sum(layout: jl.Layout, normal: Any, delta64: Any) -> None:
    factors, w = _factors(layout, normal), normal(*layout.shape, seed=3)
    weight = virtual_weight(w, factors, "w")
    assert (weight.shape, weight.ndim, weight.dtype) == (w.shape, w.ndim, w.dtype)
    np.testing.assert_allclose(weight.delta(), delta64(factors), rtol=0, atol=2e-6)
    want = np.asarray(w, np.float64) + delta64(factors)
    np.testing.assert_allclose(weight.materialize(), want, rtol=0, atol=2e-6)
    assert np.abs(delta64(factors)).max() > 0.1


def test_the_order_of_a_factor_s_axes_is_free(normal: Any, delta64: Any) -> None:
    layout = jl.Layout((3, 6, 4), (1,), (2,), (0,))
    factors = _factors(layout, normal)
    weight = virtual_weight(normal(*layout.shape), factors, "w")
    assert weight.a_axes == (0, 1, RANK)
    assert weight.b_axes == (0, RANK, 2)
    shuffled = weight.map_parts(
        weight.w, lambda f, axes: (f.transpose(2, 0, 1), (axes[2], axes[0], axes[1]))
    )
    assert shuffled.a_axes == (RANK, 0, 1)
    np.testing.assert_allclose(shuffled.delta(), delta64(factors), rtol=0, atol=2e-6)
    # Negative control: on a square weight, other labels are another update.
    square = jl.Layout((4, 4), (0,), (1,))
    one = virtual_weight(normal(4, 4), _factors(square, normal), "w")
    turned = dataclasses.replace(one, a_axes=(1, RANK), b_axes=(RANK, 0))
    np.testing.assert_allclose(turned.delta(), one.delta().T, rtol=0, atol=2e-6)
    assert not np.allclose(turned.delta(), one.delta())


def test_an_axis_that_neither_factor_has_is_broadcast(normal: Any, delta64: Any) -> None:
    layout = jl.Layout((6, 4), (0,), (1,))
    factors, w = _factors(layout, normal), normal(6, 5, 4)
    weight = LoraWeight(w, factors.a, factors.b, factors.scale, (0, RANK), (RANK, 2), path="w")
    assert weight.delta().shape == (6, 1, 4)
    want = np.asarray(w, np.float64) + delta64(factors)[:, None]
    np.testing.assert_allclose(weight.materialize(), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("base", "factor"),
    [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")],
)
def test_the_sum_is_made_in_the_wider_dtype(base: Any, factor: Any, normal: Any) -> None:
    """The tests run under strict promotion, in which mixing these would be an error."""
    layout = jl.Layout((6, 4), (0,), (1,))
    weight = virtual_weight(normal(6, 4).astype(base), _factors(layout, normal, factor), "w")
    formed = weight.materialize()
    assert formed.dtype == base
    want = (weight.w.astype(jnp.float32) + weight.delta().astype(jnp.float32)).astype(base)
    np.testing.assert_array_equal(formed, want)


def test_wider() -> None:
    assert wider(jnp.bfloat16, jnp.float32) == jnp.float32
    assert wider(jnp.bfloat16, jnp.float16) == jnp.float32
    assert wider(jnp.float16, jnp.float16) == jnp.float16


def test_it_is_a_pytree_with_static_labels(normal: Any) -> None:
    layout = jl.Layout((6, 4), (0,), (1,))
    weight = virtual_weight(normal(6, 4), _factors(layout, normal), "net/w")
    leaves, treedef = jax.tree.flatten(weight)
    assert [leaf.shape for leaf in leaves] == [(6, 4), (6, 2), (2, 4), ()]
    again = jax.jit(lambda weight: weight)(weight)
    assert (again.path, again.a_axes, again.b_axes) == ("net/w", (0, RANK), (RANK, 1))
    assert jax.tree.structure(dataclasses.replace(weight, path="other")) != treedef


def test_a_small_update_is_not_lost_in_the_product_s_precision(normal: Any) -> None:
    """``scale a b`` asks for the highest precision: on accelerators the default has 8-10 bits."""
    layout = jl.Layout((6, 4), (0,), (1,))
    weight = virtual_weight(normal(6, 4), _factors(layout, normal), "w")
    jaxpr = jax.make_jaxpr(lambda weight: weight.delta())(weight)
    (dot,) = [
        eqn
        for outer in jaxpr.jaxpr.eqns
        for eqn in (getattr(outer.params.get("jaxpr"), "eqns", None) or [outer])
        if eqn.primitive.name == "dot_general"
    ]
    assert set(dot.params["precision"]) == {jax.lax.Precision.HIGHEST}
