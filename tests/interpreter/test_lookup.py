"""Rows looked up by traced ids: factored, in bounds and out of them; experts stay weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_lora as jl
from jax_lora.interpreter import Interpreter
from jax_lora.virtual import LoraWeight, virtual_weight

TABLE = jl.Layout((7, 4), (0,), (1,))
TRANSPOSED = jl.Layout((4, 7), (1,), (0,))
HEADS = jl.Layout((7, 2, 3), (0,), (1, 2))
GRID = jl.Layout((5, 3, 4), (0, 1), (2,))
STACK = jl.Layout((3, 7, 4), (1,), (2,), (0,))
LAST = jl.Layout((7, 4, 3), (0,), (1,), (2,))
MIXED = jl.Layout((3, 5, 4), (1,), (0, 2))

IDS = np.array([[0, 6, 2], [2, 2, 5]], np.int32)
WILD = np.array([3, -1, -7, -8, 7, 40, 0], np.int32)  # counted from the end, and out of bounds


@pytest.fixture(scope="module")
def random_adapter(filled: Any) -> Callable[..., jl.Adapter]:
    def make(layout: jl.Layout, rank: int = 2) -> jl.Adapter:
        a, b = jnp.zeros(layout.a_shape(rank)), jnp.zeros(layout.b_shape(rank))
        return filled(jl.Adapter({"w": jl.LoraFactors(a, b, jnp.float32(1), layout)}))

    return make


# name: (layout, fun(w, ids), ids). The result is dense: what follows a lookup needs its entries.
LOOKUPS: dict[str, tuple[jl.Layout, Callable[[Any, Any], Any], np.ndarray]] = {
    "ids": (TABLE, lambda w, i: w[i], IDS[0]),
    "one id": (TABLE, lambda w, i: w[i] * 2.0, IDS[0, :1]),
    "ids [2, 3]": (TABLE, lambda w, i: w[i], IDS),
    "ids [2, 1, 3]": (TABLE, lambda w, i: jnp.take(w, i, axis=0, mode="clip"), IDS[:, None]),
    "out heads": (HEADS, lambda w, i: w[i], IDS),
    "transposed table": (TRANSPOSED, lambda w, i: w.T[i], IDS),
    "along the out axis": (TABLE, lambda w, i: w[:, i], IDS[1] % 4),
    "along the second axis": (TRANSPOSED, lambda w, i: jnp.take(w, i, axis=1), IDS),
    "negative": (TABLE, lambda w, i: w[i], -1 - IDS),
    "out of bounds, fill": (
        TABLE,
        lambda w, i: jnp.take(w, i, axis=0, mode="fill", fill_value=0),
        WILD,
    ),
    "out of bounds, fill 3": (
        TABLE,
        lambda w, i: w.at[i].get(mode="fill", fill_value=3.0),
        WILD,
    ),
    "out of bounds, clip": (TABLE, lambda w, i: jnp.take(w, i, axis=0, mode="clip"), WILD),
    "out of bounds, wrap": (TABLE, lambda w, i: jnp.take(w, i, axis=0, mode="wrap"), WILD),
    "out of bounds, drop": (TABLE, lambda w, i: w.at[i].get(mode="drop", fill_value=0.0), WILD),
    "two in-axes": (GRID, lambda w, i: w[i[0], i[1]], IDS % 3),
    "in-axis and out-axis": (MIXED, lambda w, i: w[i[0], i[1]], IDS % 3),
    "layer and row": (STACK, lambda w, i: w[i[0] % 3, i[1]], IDS),
    "row of one layer": (STACK, lambda w, i: w[1][i], IDS),
    "row and entry": (TABLE, lambda w, i: w[i[0], i[1] % 4], IDS),
    "rows each with an entry": (TABLE, lambda w, i: w[i[:, None], i % 4], IDS[0]),
    "vmap over ids": (TABLE, lambda w, i: jax.vmap(lambda k: w[k])(i), IDS[0]),
    "window": (
        TABLE,
        lambda w, i: lax.gather(
            w,
            i[:, None],
            lax.GatherDimensionNumbers((1, 2), (), (0,)),
            slice_sizes=(3, 4),
            mode="clip",
        ),
        IDS[0],
    ),
    "window out of bounds": (
        TABLE,
        lambda w, i: lax.gather(
            w,
            jnp.stack([i, i % 3], 1),
            lax.GatherDimensionNumbers((1, 2), (), (0, 1)),
            slice_sizes=(3, 2),
            mode="fill",
            fill_value=2.0,
        ),
        WILD,
    ),
    "window that moves along no whole axis": (
        TABLE,
        lambda w, i: lax.gather(
            w,
            jnp.stack([i, i % 2], 1),
            lax.GatherDimensionNumbers((1, 2), (), (0, 1)),
            slice_sizes=(3, 4),
            mode="fill",
            fill_value=2.0,
        ),
        np.array([0, 1, 2, 3, 4, 5], np.int32),
    ),
    "start of a row": (
        TABLE,
        lambda w, i: lax.gather(
            w, i[:, None], lax.GatherDimensionNumbers((1,), (0,), (0,)), slice_sizes=(1, 3)
        ),
        IDS[0],
    ),
    "an entry of each column": (
        TABLE,
        lambda w, i: jnp.take_along_axis(w, i, axis=0),
        np.array([[0, 6, 2, 2], [1, 1, 5, 0]], np.int32),
    ),
    "an entry of each row": (
        TABLE,
        lambda w, i: jnp.take_along_axis(w, i[:, None], axis=1),
        np.array([0, 3, 2, 2, 1, 1, 0], np.int32),
    ),
    "rows of each layer": (STACK, lambda w, i: jax.vmap(lambda w, k: w[k])(w, i), IDS.T),
    "a row of each layer": (STACK, lambda w, i: jax.vmap(lambda w, k: w[k])(w, i), IDS[0]),
    "rows of each layer, axis last": (
        LAST,
        lambda w, i: jax.vmap(lambda w, k: jnp.take(w, k, axis=0), in_axes=(2, 0))(w, i),
        IDS.T,
    ),
    "lookup in a lookup": (TABLE, lambda w, i: w[i[i % 3]], IDS[0]),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups(name: str, normal: Any, random_adapter: Any, check_dense: Any) -> None:
    layout, fun, ids = LOOKUPS[name]
    adapter = random_adapter(layout)
    check_dense(lambda p, i: fun(p["w"], i), {"w": normal(*layout.shape)}, adapter, ids)


# name: (layout, fun(w, ids, x), shape of x): matrices that are picked stay weights, and multiply.
PICKED: dict[str, tuple[jl.Layout, Callable[[Any, Any, Any], Any], tuple[int, ...]]] = {
    "an expert for each row": (
        STACK,
        lambda w, i, x: jnp.einsum("bi,bio->bo", x, w[i]),
        (3, 7),
    ),
    "experts of a stack that comes last": (
        LAST,
        lambda w, i, x: jnp.einsum("bi,iob->bo", x, w[..., i]),
        (3, 7),
    ),
    "experts [3, 1], transposed": (
        STACK,
        lambda w, i, x: jnp.einsum("bi,bkoi->bko", x, w[i[:, None]].swapaxes(2, 3)),
        (3, 7),
    ),
    "experts by vmap": (
        STACK,
        lambda w, i, x: jax.vmap(lambda k, x: x @ w[k])(i, x),
        (3, 7),
    ),
    "every second row": (TABLE, lambda w, i, x: x @ w[::2], (5, 4)),
    "every second column": (TABLE, lambda w, i, x: x @ w[:, 1::2], (5, 7)),
}


@pytest.mark.parametrize("name", PICKED)
def test_picked_matrices_are_weights(
    name: str, normal: Any, random_adapter: Any, check_dense: Any
) -> None:
    layout, fun, shape = PICKED[name]
    adapter, w, ids = random_adapter(layout), normal(*layout.shape), IDS[1] % 3
    x = normal(*shape)
    check_dense(lambda p, i, x: fun(p["w"], i, x), {"w": w}, adapter, ids, x)
    interpreter = Interpreter(strict=True)
    jaxpr = jax.make_jaxpr(lambda w, x: fun(w, ids, x))(w, x)
    interpreter.run(jaxpr.jaxpr, jaxpr.consts, [virtual_weight(w, adapter["w"], "w"), x])
    (event,) = interpreter.events
    assert (event.primitive, event.factored) == ("dot_general", True)


@pytest.mark.parametrize("layout", [TABLE, STACK])
def test_out_of_bounds_by_default_is_the_nan_of_the_base(
    layout: jl.Layout, normal: Any, random_adapter: Any
) -> None:
    """The update adds 0 there: it neither hides the NaN nor makes one elsewhere."""
    adapter, w = random_adapter(layout), normal(*layout.shape)

    def fun(params: Any, ids: Any) -> Any:
        return jnp.take(params["w"], ids, axis=0) + 0.0

    got = np.asarray(jl.apply(fun)({"w": w}, adapter, WILD))
    want = np.asarray(fun(jl.merge({"w": w}, adapter), WILD))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    lost = np.isnan(got).reshape(len(WILD), -1)
    size = layout.shape[0]
    assert [bool(row.all()) for row in lost] == [not -size <= i < size for i in WILD.tolist()]
    assert [bool(row.any()) for row in lost] == [bool(row.all()) for row in lost]


def test_one_of_two_ids_out_of_bounds(normal: Any, random_adapter: Any, check_dense: Any) -> None:
    """Each factor sees only some of the ids; a result is filled if any id is out of bounds."""
    first, second = np.array([1, 9, 1, 9], np.int32), np.array([2, 2, 9, 9], np.int32)

    def fun(params: Any, i: Any, j: Any) -> Any:
        return params["w"].at[i, j].get(mode="fill", fill_value=0.5)

    for layout in (STACK, GRID, MIXED):
        check_dense(fun, {"w": normal(*layout.shape)}, random_adapter(layout), first, second)


def test_ids_that_are_sorted_by_all_columns_are_not_sorted_by_one(
    normal: Any, random_adapter: Any
) -> None:
    def fun(w: Any, ids: Any) -> Any:
        return w.at[ids[:, 0], ids[:, 1]].get(
            mode="promise_in_bounds", indices_are_sorted=True, unique_indices=True
        )

    ids, w = np.array([[0, 5], [1, 2], [2, 6], [2, 1]][:3], np.int32), normal(3, 7, 4)
    weight = virtual_weight(w, random_adapter(MIXED_ROWS)["w"], "w")
    jaxpr = jax.make_jaxpr(fun)(w, ids)

    def run(weight: LoraWeight) -> Any:
        return Interpreter(strict=True).run(jaxpr.jaxpr, jaxpr.consts, [weight, ids])

    gathers = [e for e in jax.make_jaxpr(run)(weight).jaxpr.eqns if e.primitive.name == "gather"]
    sorted_by = [e.params["indices_are_sorted"] for e in gathers]
    assert sorted_by[0] is True
    assert not any(sorted_by[1:])  # W by both columns, each factor by one
    np.testing.assert_allclose(run(weight)[0], fun(weight.materialize(), ids), rtol=0, atol=1e-5)


MIXED_ROWS = jl.Layout((3, 7, 4), (1,), (0, 2))


def test_a_lookup_forms_no_table(normal: Any, random_adapter: Any) -> None:
    """What a lookup computes has the size of the rows looked up, not of the table."""
    layout = jl.Layout((997, 8), (0,), (1,))
    params, adapter = {"w": normal(997, 8)}, random_adapter(layout)

    def shapes(fun: Any) -> set[tuple[int, ...]]:
        jaxpr = jax.make_jaxpr(jax.grad(lambda a: fun(params, a, IDS).sum()))(adapter).jaxpr
        inner = [e for e in jaxpr.eqns if e.primitive.name != "pjit"]
        return {tuple(v.aval.shape) for e in inner for v in e.outvars}

    def fun(params: Any, ids: Any) -> Any:
        return params["w"][ids]

    assert (997, 8) not in shapes(jl.apply(fun, strict=True))
    assert (997, 8) in shapes(lambda p, a, i: fun(jl.merge(p, a), i))  # negative control
