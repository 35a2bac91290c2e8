"""Merge and unmerge are arithmetic on trees."""

from __future__ import annotations

import dataclasses
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
    "experts last": jl.Layout((6, 4, 3), (1,), (0,), (2,)),
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
