"""The axes of a weight are read from what a function does with it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jax_lora as jl
from jax_lora.discover import Use, low_rank_multiply_adds


def _shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def _scan(params: Any, x: Any) -> Any:
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]


@jax.custom_jvp
def _own_jvp(x: Any, w: Any) -> Any:
    return x @ w


@jax.custom_vjp
def _own_vjp(x: Any, w: Any) -> Any:
    return x @ w


_own_vjp.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


# fun, the weight's shape, the input's shape, (in, out, stack), multiply-adds
PRODUCTS: dict[str, Any] = {
    "x W": (lambda p, x: x @ p["w"], (6, 4), (5, 6), ((0,), (1,), ()), 5 * 24),
    "x W^T": (lambda p, x: x @ p["w"].T, (4, 6), (5, 6), ((1,), (0,), ()), 5 * 24),
    "W x": (lambda p, x: p["w"] @ x, (4, 6), (6, 5), ((1,), (0,), ()), 5 * 24),
    "heads out": (
        lambda p, x: jnp.einsum("bti,ihd->bthd", x, p["w"]),
        (6, 2, 3),
        (5, 7, 6),
        ((0,), (1, 2), ()),
        35 * 36,
    ),
    "heads in": (
        lambda p, x: jnp.einsum("bthd,hdo->bto", x, p["w"]),
        (2, 3, 6),
        (5, 7, 2, 3),
        ((0, 1), (2,), ()),
        35 * 36,
    ),
    "experts": (
        lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"]),
        (3, 6, 4),
        (3, 5, 6),
        ((1,), (2,), (0,)),
        15 * 24,
    ),
    "reshaped heads": (
        lambda p, x: x @ p["w"].reshape(6, 6),
        (6, 2, 3),
        (5, 6),
        ((0,), (1, 2), ()),
        5 * 36,
    ),
    "scan": (_scan, (3, 4, 4), (5, 4), ((1,), (2,), (0,)), 3 * 5 * 16),
    "scan of scan": (
        lambda p, x: lax.scan(lambda x, w: (_scan({"w": w}, x), None), x, p["w"])[0],
        (2, 3, 4, 4),
        (5, 4),
        ((2,), (3,), (0, 1)),
        6 * 5 * 16,
    ),
    "scan with the weight constant": (
        lambda p, x: lax.scan(lambda x, _: (x @ p["w"], None), x, None, length=3)[0],
        (4, 4),
        (5, 4),
        ((0,), (1,), ()),
        3 * 5 * 16,
    ),
    "scan with the weight carried": (
        lambda p, x: lax.scan(lambda c, _: ((c[0] @ c[1], c[1]), None), (x, p["w"]), None, 3)[0][0],
        (4, 4),
        (5, 4),
        ((0,), (1,), ()),
        3 * 5 * 16,
    ),
    "one layer of a stack": (
        lambda p, x: x @ p["w"][1],
        (3, 6, 4),
        (5, 6),
        ((1,), (2,), (0,)),
        5 * 24,
    ),
    "the layer of a stack of one": (
        lambda p, x: x @ p["w"][0],
        (1, 6, 4),
        (5, 6),
        ((1,), (2,), (0,)),
        5 * 24,
    ),
    "a layer by a traced index": (
        lambda p, x: (
            x @ lax.dynamic_index_in_dim(p["w"], x.shape[0] * x[0, 0].astype(jnp.int32))[0]
        ),
        (3, 6, 4),
        (5, 6),
        ((1,), (2,), (0,)),
        5 * 24,
    ),
    "vmap over layers": (
        lambda p, x: jax.vmap(jnp.matmul, in_axes=(None, 0))(x, p["w"]),
        (3, 6, 4),
        (5, 6),
        None,
        3 * 5 * 24,
    ),
    "jit": (jax.jit(lambda p, x: x @ p["w"]), (6, 4), (5, 6), ((0,), (1,), ()), 5 * 24),
    "remat": (jax.checkpoint(lambda p, x: x @ p["w"]), (6, 4), (5, 6), ((0,), (1,), ()), 5 * 24),
    "custom_jvp": (
        lambda p, x: _own_jvp(x, p["w"]),
        (6, 4),
        (5, 6),
        ((0,), (1,), ()),
        5 * 24,
    ),
    "custom_vjp": (
        lambda p, x: _own_vjp(x, p["w"]),
        (6, 4),
        (5, 6),
        ((0,), (1,), ()),
        5 * 24,
    ),
    "a layer that a scan returned": (
        lambda p, x: x @ lax.scan(lambda c, w: (c, w.T), 0, p["w"])[1][1],
        (3, 6, 4),
        (5, 4),
        ((2,), (1,), (0,)),
        5 * 24,
    ),
    "a weight that a branch returned": (
        lambda p, x: x @ lax.cond(x[0, 0] > 0, lambda: p["w"].T, lambda: jnp.ones((4, 6))),
        (6, 4),
        (5, 4),
        ((1,), (0,), ()),
        5 * 24,
    ),
    "a weight after a while loop": (
        lambda p, x: (lambda c: x @ c[1])(
            lax.while_loop(lambda c: c[0] < x[0, 0], lambda c: (c[0] + 1, c[1]), (0.0, p["w"]))
        ),
        (6, 4),
        (5, 6),
        ((0,), (1,), ()),
        5 * 24,
    ),
    "every second row": (
        lambda p, x: x @ p["w"][::2],
        (6, 4),
        (5, 3),
        ((0,), (1,), ()),
        5 * 12,
    ),
    "half of a split, reversed": (
        lambda p, x: x @ jnp.split(p["w"], 2, axis=1)[1][::-1],
        (6, 4),
        (5, 6),
        ((0,), (1,), ()),
        5 * 12,
    ),
    "cast": (
        lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16),
        (6, 4),
        (5, 6),
        ((0,), (1,), ()),
        5 * 24,
    ),
    "scaled": (lambda p, x: x @ (-p["w"] / 2.0), (6, 4), (5, 6), ((0,), (1,), ()), 5 * 24),
    "new axis": (lambda p, x: x @ p["w"][None], (6, 4), (5, 6), ((0,), (1,), ()), 5 * 24),
}

_own_jvp.defjvp(lambda primals, tangents: (_own_jvp(*primals), tangents[0] @ primals[1]))


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    fun, weight, x, roles, cost = PRODUCTS[name]
    (use,) = jl.discover(fun, {"w": _shape(*weight)}, _shape(*x))["w"]
    assert use.primitive == "dot_general"
    assert use.multiply_adds == cost
    if roles is None:  # vmap of a product with an unbatched x: the layers are more outputs
        roles = ((1,), (0, 2), ())
    assert (use.in_axes, use.out_axes, use.stack_axes) == roles
    assert use.layout(weight) == jl.Layout(weight, *roles)


def test_uses_keep_the_order_of_the_program_and_unused_parameters_come_last() -> None:
    def fun(p: Any, x: Any) -> Any:
        return (x @ p["z"] + p["bias"]) @ p["a"]

    params = {name: _shape(4, 4) for name in ("a", "m", "z")} | {"bias": _shape(4)}
    uses = jl.discover(fun, params, _shape(5, 4))
    assert list(uses) == ["z", "bias", "a", "m"]
    assert uses["m"] == ()


def test_an_elementwise_use_is_no_product() -> None:
    (use,) = jl.discover(lambda p, x: x + p["bias"], {"bias": _shape(4)}, _shape(5, 4))["bias"]
    assert (use.primitive, use.in_axes, use.out_axes) == ("add", (), (0,))
    assert (use.multiply_adds, use.output_shape) == (20, (5, 4))
    assert use.layout((4,)) is None


def test_a_product_that_leaves_no_output_axis_is_no_matrix() -> None:
    (use,) = jl.discover(lambda p, x: x @ p["v"], {"v": _shape(4)}, _shape(5, 4))["v"]
    assert use.primitive == "dot_general"
    assert use.layout((4,)) is None


def test_a_lookup_is_a_product_with_one_hot_rows_that_costs_nothing() -> None:
    def fun(p: Any, ids: Any) -> Any:
        return p["table"][ids] @ p["table"].T

    gather, product = jl.discover(fun, {"table": _shape(9, 4)}, _shape(5, dtype=jnp.int32))["table"]
    assert (gather.primitive, gather.multiply_adds) == ("gather", 0)
    assert gather.layout((9, 4)) == jl.Layout((9, 4), (0,), (1,))
    assert product.layout((9, 4)) == jl.Layout((9, 4), (1,), (0,))


def test_a_scalar_parameter_scales_a_weight() -> None:
    def fun(p: Any, x: Any) -> Any:
        return x @ (p["gain"] * p["w"])

    uses = jl.discover(fun, {"gain": _shape(), "w": _shape(6, 4)}, _shape(5, 6))
    assert [use.primitive for use in uses["gain"]] == ["mul"]
    assert [use.primitive for use in uses["w"]] == ["dot_general"]


def _catted(p: Any, x: Any) -> Any:
    return x @ jnp.concatenate([p["w"], jnp.ones((6, 1)), p["v"][:, :2]], axis=1)


def _normalised(p: Any, x: Any) -> Any:
    centred = p["w"] - p["w"].mean(0)
    return x @ (p["gain"] * centred / jnp.sqrt((centred**2).sum(0) + 1))


def _masked_in_a_loop(p: Any, x: Any) -> Any:
    mask = jnp.triu(jnp.ones((6, 6)))
    return lax.scan(lambda x, w: (x @ (w * mask), None), x, p["w"])[0]


# Of weights that are joined with others or changed on their way to a product: fun, the shapes, and
# for each parameter its layout or None, and the multiply-adds of its products with 5 rows.
JOINED: dict[str, Any] = {
    "masked by a parameter": (
        lambda p, x: x @ (p["mask"] * p["w"]),
        {"mask": (6, 4), "w": (6, 4)},
        {"mask": (((0,), (1,)), 5 * 24), "w": (((0,), (1,)), 0)},
    ),
    "a sum of weights": (
        lambda p, x: x @ (p["w"] + p["v"].T).T,
        {"v": (6, 4), "w": (4, 6)},
        {"w": (((1,), (0,)), 5 * 24), "v": (((0,), (1,)), 0)},
    ),
    "concatenated": (
        _catted,
        {"v": (6, 3), "w": (6, 4)},
        {"v": (((0,), (1,)), 5 * 12), "w": (((0,), (1,)), 5 * 24)},
    ),
    "stacked": (
        lambda p, x: jnp.einsum("bi,nio->bno", x, jnp.stack([p["w"], p["v"]])),
        {"v": (6, 4), "w": (6, 4)},
        {"v": (((0,), (1,)), 5 * 24), "w": (((0,), (1,)), 5 * 24)},
    ),
    "rolled and padded": (
        lambda p, x: x @ jnp.pad(jnp.roll(p["w"], 1, axis=0), ((0, 0), (1, 1))),
        {"w": (6, 4)},
        {"w": (((0,), (1,)), 5 * 36)},
    ),
    "normalised, with a gain for each output": (
        _normalised,
        {"gain": (4,), "w": (6, 4)},
        {"gain": (None, 0), "w": (((0,), (1,)), 5 * 24)},
    ),
    "scaled by blocks": (
        lambda p, x: x @ (p["w"].reshape(3, 2, 4) * p["scales"][:, None]).reshape(6, 4),
        {"scales": (3, 4), "w": (6, 4)},
        {"scales": (None, 0), "w": (((0,), (1,)), 5 * 24)},
    ),
    "masked in a loop": (_masked_in_a_loop, {"w": (3, 6, 6)}, {"w": (((1,), (2,), (0,)), 15 * 36)}),
    "chosen by a branch": (
        lambda p, x: x @ lax.cond(x[0, 0] > 0, lambda: p["w"], lambda: p["v"].T),
        {"v": (4, 6), "w": (6, 4)},
        {"w": (((0,), (1,)), 5 * 24), "v": (((1,), (0,)), 5 * 24)},
    ),
    "behind a barrier": (
        lambda p, x: (lambda w, x: x @ w)(*lax.optimization_barrier((p["w"], x))),
        {"w": (6, 4)},
        {"w": (((0,), (1,)), 5 * 24)},
    ),
}


@pytest.mark.parametrize("name", JOINED)
def test_what_is_joined_is_still_a_weight(name: str) -> None:
    fun, shapes, expected = JOINED[name]
    uses = jl.discover(fun, {k: _shape(*sizes) for k, sizes in shapes.items()}, _shape(5, 6))
    assert set(uses) == set(expected)
    for path, (roles, cost) in expected.items():
        shape = shapes[path]
        layouts = [found for use in uses[path] if (found := use.layout(shape)) is not None]
        assert layouts == ([] if roles is None else [jl.Layout(shape, *roles)]), path
        products = (use for use in uses[path] if use.primitive == "dot_general")
        assert sum(use.multiply_adds for use in products) == cost, path


def test_what_is_joined_with_an_input_is_an_activation() -> None:
    def fun(p: Any, x: Any, ids: Any, mask: Any) -> Any:
        h = (p["table"][ids] + p["positions"]) @ (p["w"] * mask)
        tokens = jnp.concatenate([p["first"], h])
        return jnp.pad(tokens, ((0, 0), (0, 4))) @ p["head"]

    params = {"table": _shape(9, 6), "positions": _shape(5, 6), "w": _shape(6, 4)}
    params |= {"first": _shape(1, 4), "head": _shape(8, 2)}
    ids = _shape(5, dtype=jnp.int32)
    uses = jl.discover(fun, params, _shape(5, 6), ids, _shape(6, 4))
    primitives = {path: [use.primitive for use in found] for path, found in uses.items()}
    assert primitives == {
        "table": ["gather"],
        "positions": ["add"],
        "w": ["mul"],
        "first": ["concatenate"],
        "head": ["dot_general"],
    }


def test_printing_is_no_use() -> None:
    def fun(p: Any, x: Any) -> Any:
        jax.debug.print("{}", p["w"])
        return x @ p["w"]

    (use,) = jl.discover(fun, {"w": _shape(6, 4)}, _shape(5, 6))["w"]
    assert use.primitive == "dot_general"


def test_leaves_that_are_not_arrays_are_left_out() -> None:
    params = {"w": _shape(6, 4), "eps": 1e-5, "act": jax.nn.relu, "nothing": None}
    uses = jl.discover(lambda p, x: p["act"](x @ p["w"]) + p["eps"], params, _shape(5, 6))
    assert list(uses) == ["w"]


def test_nothing_is_computed(normal: Any) -> None:
    """A 4 TiB weight: shapes are enough."""
    huge = {"w": _shape(2**20, 2**20)}
    (use,) = jl.discover(lambda p, x: x @ p["w"], huge, _shape(2**20, 2**20))["w"]
    assert use.multiply_adds == 2**60


def test_shapes_and_dtypes_of_a_use() -> None:
    def fun(p: Any, x: Any) -> Any:
        return lax.dot_general(
            x, p["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )

    weight, x = _shape(6, 4, dtype=jnp.bfloat16), _shape(5, 6, dtype=jnp.bfloat16)
    (use,) = jl.discover(fun, {"w": weight}, x)["w"]
    assert (use.input_shape, use.output_shape, use.output_bytes) == ((5, 6), (5, 4), 80)


def test_low_rank_multiply_adds_in_closed_form() -> None:
    layout = jl.Layout((3, 6, 4), (1,), (2,), (0,))
    use = Use("dot_general", (1,), (2,), (0,), (5, 6), (5, 4), "float32", 3 * 5 * 24)
    other = Use("add", (), (2,), (), (5, 6), (5, 4), "float32", 1000)
    # Three layers of 5 rows, each 2 x (6 + 4); the elementwise use adds nothing.
    assert low_rank_multiply_adds(layout, 2, [use, other]) == 3 * 5 * 2 * 10
    assert low_rank_multiply_adds(layout, 2, [use, use]) == 2 * 3 * 5 * 2 * 10


def test_lookups_under_vmap() -> None:
    """A table for each layer: the axis paired with the ids' is a stack; rows may be windows."""

    def each(p: Any, ids: Any) -> Any:
        return jax.vmap(lambda w, k: w[k])(p["w"], ids)

    (use,) = jl.discover(each, {"w": _shape(3, 9, 4)}, _shape(3, dtype=jnp.int32))["w"]
    assert use.layout((3, 9, 4)) == jl.Layout((3, 9, 4), (1,), (2,), (0,))

    def shared(p: Any, ids: Any) -> Any:
        return jax.vmap(lambda k: p["w"][k])(ids)

    (use,) = jl.discover(shared, {"w": _shape(9, 4)}, _shape(3, dtype=jnp.int32))["w"]
    assert use.layout((9, 4)) == jl.Layout((9, 4), (0,), (1,))


def test_convolutions() -> None:
    """The window and the in-features are inputs; a group of one out-feature sees its own alone."""

    def fun(p: Any, x: Any) -> Any:
        return lax.conv_general_dilated(
            x,
            p["w"],
            (2, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        )

    (use,) = jl.discover(fun, {"w": _shape(3, 2, 4, 6)}, _shape(5, 9, 7, 8))["w"]
    assert use.layout((3, 2, 4, 6)) == jl.Layout((3, 2, 4, 6), (0, 1, 2), (3,))
    assert (use.output_shape, use.multiply_adds) == ((5, 4, 6, 6), 5 * 4 * 6 * 6 * 3 * 2 * 4)


def test_mixtures_of_experts() -> None:
    def fun(p: Any, x: Any, sizes: Any) -> Any:
        return lax.ragged_dot(x, p["w"], sizes)

    (use,) = jl.discover(fun, {"w": _shape(3, 6, 4)}, _shape(5, 6), _shape(3, dtype=jnp.int32))["w"]
    assert use.primitive == "ragged_dot_general"
    assert use.layout((3, 6, 4)) == jl.Layout((3, 6, 4), (1,), (2,), (0,))
    assert use.multiply_adds == 5 * 6 * 4  # each row meets one expert


def test_both_branches_and_the_condition_count() -> None:
    def fun(p: Any, x: Any) -> Any:
        y = lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: jnp.sin(x @ p["v"]))
        return lax.while_loop(lambda y: (y @ p["u"]).sum() < 1, lambda y: y @ p["w"], y)

    params = {name: _shape(4, 4) for name in "uvw"}
    uses = jl.discover(fun, params, _shape(5, 4))
    assert {path: len(found) for path, found in uses.items()} == {"u": 1, "v": 1, "w": 2}
    assert all(use.layout((4, 4)) for found in uses.values() for use in found)


def test_what_decides_a_branch_is_used_there() -> None:
    def fun(p: Any, x: Any) -> Any:
        return lax.cond(p["flag"], jnp.sin, jnp.cos, x)

    uses = jl.discover(fun, {"flag": _shape(dtype=jnp.bool_)}, _shape(5, 4))["flag"]
    assert [use.primitive for use in uses]


def test_matrices_picked_by_an_index_are_a_stack() -> None:
    """And rows picked by one are inputs, also those of several axes that meet another weight."""
    params = {"experts": jnp.ones((3, 8, 6)), "table": jnp.ones((11, 2, 4)), "q": jnp.ones((4, 5))}

    def fun(p: Any, x: Any, ids: Any) -> Any:
        y = jnp.einsum("bd,bdf->bf", x, p["experts"][ids])
        return y.sum() + jnp.einsum("bhk,kq->bhq", p["table"][ids], p["q"]).sum()

    uses = jl.discover(fun, params, jnp.ones((4, 8)), jnp.arange(4))
    (experts,), (table,), (q,) = (uses[name] for name in ("experts", "table", "q"))
    assert (experts.primitive, table.primitive) == ("dot_general", "gather")
    assert (experts.stack_axes, experts.in_axes, experts.out_axes) == ((0,), (1,), (2,))
    assert (table.stack_axes, table.in_axes, table.out_axes) == ((), (0,), (1, 2))
    assert (q.stack_axes, q.in_axes, q.out_axes) == ((), (0,), (1,))
    assert experts.multiply_adds == 4 * 8 * 6

    def one(p: Any, x: Any, expert: Any) -> Any:
        return x @ p["experts"][expert]

    (use,) = jl.discover(one, params, jnp.ones((4, 8)), jnp.int32(1))["experts"]
    assert (use.stack_axes, use.in_axes, use.out_axes) == ((0,), (1,), (2,))
    assert use.multiply_adds == 4 * 8 * 6


def test_a_sum_is_a_weight_only_with_a_term_that_no_input_reaches() -> None:
    params = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}

    def fun(p: Any, x: Any) -> Any:
        y = x @ (p["w"] - 2 * jnp.eye(4))
        return y @ (p["v"] + x) + p["b"]

    uses = jl.discover(fun, params, jnp.ones((4, 4)))
    assert [use.primitive for use in uses["w"]] == ["dot_general"]
    assert [use.primitive for use in uses["v"]] == ["add"]
    assert [use.primitive for use in uses["b"]] == ["add"]

    def looped(p: Any, x: Any) -> Any:
        # What a loop carries may depend on the input after a step.
        carry = (x, jnp.eye(4))
        return jax.lax.fori_loop(0, 3, lambda _, c: (c[0] @ (p["w"] + c[1]), c[0]), carry)[0]

    assert [use.primitive for use in jl.discover(looped, params, jnp.ones((4, 4)))["w"]] == ["add"]
