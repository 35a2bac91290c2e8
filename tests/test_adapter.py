"""An adapter is a mapping, a pytree, and knows what it fits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.adapter import RANK, check_fits, leaves_by_path


def _entry(layout: jl.Layout, rank: int = 2, value: float = 1.0) -> jl.LoraFactors:
    a, b = jnp.full(layout.a_shape(rank), value), jnp.full(layout.b_shape(rank), value)
    return jl.LoraFactors(a, b, jnp.float32(0.5), layout)


@pytest.fixture
def adapter() -> jl.Adapter:
    return jl.Adapter(
        {
            "net/l2/kernel": _entry(jl.Layout((4, 3), (0,), (1,))),
            "net/l1/kernel": _entry(jl.Layout((5, 6, 4), (1,), (2,), (0,))),
        }
    )


@pytest.mark.parametrize(
    ("layout", "a_shape", "b_shape", "fans"),
    [
        (jl.Layout((6, 4), (0,), (1,)), (6, 7), (7, 4), (6, 4)),
        (jl.Layout((6, 4), (1,), (0,)), (4, 7), (7, 6), (4, 6)),
        (jl.Layout((3, 6, 4), (1,), (2,), (0,)), (3, 6, 7), (3, 7, 4), (6, 4)),
        (jl.Layout((6, 4, 3), (1,), (0,), (2,)), (3, 4, 7), (3, 7, 6), (4, 6)),
        (jl.Layout((2, 3, 4, 5), (0, 1), (2, 3)), (2, 3, 7), (7, 4, 5), (6, 20)),
        (jl.Layout((2, 3, 4, 5), (3, 0), (1,), (2,)), (4, 5, 2, 7), (4, 7, 3), (10, 3)),
    ],
)
def test_layout_gives_the_factors_their_shapes(
    layout: jl.Layout, a_shape: Any, b_shape: Any, fans: Any
) -> None:
    assert layout.a_shape(7) == a_shape
    assert layout.b_shape(7) == b_shape
    assert (layout.fan_in, layout.fan_out) == fans
    assert layout.a_axes[-1] == RANK
    assert layout.b_axes[len(layout.stack_axes)] == RANK
    assert hash(layout) == hash(dataclasses.replace(layout))  # a static part of a pytree


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((4, 3), ((0,), ())),  # no output
        ((4, 3), ((), (0, 1))),  # no input
        ((4, 3), ((0,), (0,))),  # one axis twice, one never
        ((4, 3), ((0,), (1,), (0,))),
        ((4, 3), ((0,), (2,))),  # no such axis
        ((4, 3, 2), ((0,), (1,))),  # an axis without a role
    ],
)
def test_a_layout_without_one_role_for_each_axis_is_refused(shape: Any, axes: Any) -> None:
    with pytest.raises(jl.AdapterError, match=r"expected every axis .*; got in="):
        jl.Layout(shape, *axes)


def test_mapping(adapter: jl.Adapter) -> None:
    assert list(adapter) == ["net/l1/kernel", "net/l2/kernel"]  # in one order, however made
    assert len(adapter) == 2
    assert "net/l1/kernel" in adapter
    assert "net/l1/bias" not in adapter
    assert adapter["net/l1/kernel"].rank == 2
    with pytest.raises(KeyError, match="nearest: 'net/l1/kernel'"):
        adapter["net/l1/kernal"]


def test_asking_for_a_path_searches_no_near_misses(
    adapter: jl.Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`apply` asks for every parameter, and most of a large model's may not be adapted."""
    searched = []
    monkeypatch.setattr("jax_lora.adapter.near_misses", lambda *args: searched.append(args))
    assert "net/l1/bias" not in adapter
    assert searched == []
    with pytest.raises(KeyError):
        adapter["net/l1/bias"]
    assert len(searched) == 1


def test_it_counts_what_is_trained(adapter: jl.Adapter) -> None:
    assert adapter.trainable_params == (4 * 2 + 2 * 3) + 5 * (6 * 2 + 2 * 4)
    assert adapter.nbytes == 4 * (adapter.trainable_params + 2)  # and two scales


def test_repr_is_a_table(adapter: jl.Adapter) -> None:
    assert repr(adapter).splitlines() == [
        "Adapter(114 trainable parameters)",
        "  net/l1/kernel: rank 2",
        "  net/l2/kernel: rank 2",
    ]
    labels = jax.tree.map(lambda _: "label", adapter)
    assert "label" in repr(labels)


def test_pytree_round_trip(adapter: jl.Adapter) -> None:
    leaves, treedef = jax.tree.flatten(adapter)
    assert len(leaves) == 6  # a, b, scale of two
    again = jax.tree.unflatten(treedef, leaves)
    assert isinstance(again, jl.Adapter)
    assert all(again[path].a is adapter[path].a for path in adapter)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(adapter)]
    assert paths[:3] == [f"['net/l1/kernel'].{name}" for name in ("a", "b", "scale")]


def test_the_layout_is_static_and_scale_is_not(adapter: jl.Adapter) -> None:
    other = {p: dataclasses.replace(f, scale=2 * f.scale) for p, f in adapter.items()}
    assert jax.tree.structure(jl.Adapter(other)) == jax.tree.structure(adapter)
    turned = _entry(jl.Layout((3, 4), (1,), (0,)))  # the same factors, another layout
    swapped = jl.Adapter({**adapter, "net/l2/kernel": turned})
    assert jax.tree.structure(swapped) != jax.tree.structure(adapter)


def test_it_passes_through_transformations(adapter: jl.Adapter) -> None:
    doubled = jax.jit(lambda a: jax.tree.map(lambda leaf: 2 * leaf, a))(adapter)
    assert isinstance(doubled, jl.Adapter)
    np.testing.assert_array_equal(doubled["net/l2/kernel"].a, 2 * np.ones((4, 2)))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 3 * leaf]), adapter)
    sums = jax.vmap(lambda a: sum(leaf.sum() for leaf in jax.tree.leaves(a)))(stacked)
    assert float(sums[1]) == 3 * float(sums[0]) == 3 * (114 + 1)
    grads = jax.grad(lambda a: (a["net/l2/kernel"].a ** 2).sum())(adapter)
    np.testing.assert_array_equal(grads["net/l2/kernel"].a, 2 * np.ones((4, 2)))


def test_leaves_by_path() -> None:
    tree = {"params": {"l1": [1, (2, None)], "l0": 3}}
    assert leaves_by_path(tree) == {"params/l0": 3, "params/l1/0": 1, "params/l1/1/0": 2}
    with pytest.raises(jl.AdapterError, match="two parameters have the path 'a/b'"):
        leaves_by_path({"a/b": 1, "a": {"b": 2}})


def test_check_fits(adapter: jl.Adapter) -> None:
    params = {"net": {"l1": {"kernel": jnp.zeros((5, 6, 4))}, "l2": {"kernel": jnp.zeros((4, 3))}}}
    check_fits(params, adapter)
    check_fits({**params, "more": jnp.zeros(2)}, adapter)  # more parameters are no problem
    params["net"]["l1"]["kernel"] = jnp.zeros((5, 4, 6))
    factors = adapter["net/l2/kernel"]
    crooked = jl.Adapter(
        {
            **adapter,
            "net/l2/kernel": dataclasses.replace(factors, b=jnp.zeros((3, 3))),
            "net/l3/kernel": factors,
        }
    )
    with pytest.raises(jl.AdapterError) as error:
        check_fits(params, crooked)
    lines = str(error.value).splitlines()
    assert lines[1:] == [
        "  net/l1/kernel: made for shape (5, 6, 4), found (5, 4, 6)",
        "  net/l2/kernel: expected a, b of shapes ((4, 2), (2, 3)), found ((4, 2), (3, 3))",
        "  net/l3/kernel: no such parameter (nearest: 'net/l2/kernel', 'net/l1/kernel')",
    ]
