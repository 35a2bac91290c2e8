"""Every form of dot_general stays factored and equals the dense product."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_lora as jl
from jax_lora.interpreter import Interpreter
from jax_lora.interpreter.contraction import low_rank_einsum
from jax_lora.virtual import virtual_weight

# lhs shape, rhs shape, which of them is the weight, (contracting, batch)
DOTS = {
    "x W": ((5, 4), (4, 3), 1, (((1,), (0,)), ((), ()))),
    "x W^T": ((5, 4), (3, 4), 1, (((1,), (1,)), ((), ()))),
    "W x": ((3, 4), (4, 5), 0, (((1,), (0,)), ((), ()))),
    "W^T x": ((4, 3), (5, 4), 0, (((0,), (1,)), ((), ()))),
    "vector": ((4,), (4, 3), 1, (((0,), (0,)), ((), ()))),
    "many rows": ((2, 5, 4), (4, 3), 1, (((2,), (0,)), ((), ()))),
    "out heads": ((5, 4), (4, 3, 2), 1, (((1,), (0,)), ((), ()))),
    "in heads": ((5, 3, 2), (3, 2, 4), 1, (((1, 2), (0, 1)), ((), ()))),
    "in heads, other order": ((2, 5, 3), (3, 4, 2), 1, (((2, 0), (0, 2)), ((), ()))),
    "in heads on the left": ((3, 4, 2), (2, 5, 3), 0, (((0, 2), (2, 0)), ((), ()))),
    "batched": ((6, 5, 4), (6, 4, 3), 1, (((2,), (1,)), ((0,), (0,)))),
    "batched, axis last": ((5, 6, 4), (4, 3, 6), 1, (((2,), (0,)), ((1,), (2,)))),
    "batched on the left": ((4, 6, 3), (5, 4, 6), 0, (((0,), (1,)), ((1,), (2,)))),
    "two batch axes": ((2, 6, 5, 4), (3, 6, 4, 2), 1, (((3,), (2,)), ((1, 0), (1, 3)))),
}


@pytest.mark.parametrize("case", DOTS)
def test_dot_general(case: str, normal: Any, planned: Any, check_dense: Any) -> None:
    lhs, rhs, side, numbers = DOTS[case]
    params, x = {"w": normal(*(lhs, rhs)[side])}, normal(*(lhs, rhs)[1 - side])

    def fun(params: Any, x: Any) -> Any:
        pair = (x, params["w"]) if side else (params["w"], x)
        return lax.dot_general(*pair, numbers)

    adapter = planned(fun, params, x)
    contract, batch = numbers
    assert set(adapter["w"].layout.in_axes) == set(contract[side])
    assert set(adapter["w"].layout.stack_axes) == set(batch[side])
    check_dense(fun, params, adapter, x)


def test_every_layout_is_right_for_every_use(normal: Any, filled: Any, check_dense: Any) -> None:
    """A weight has one layout, and may be contracted over other axes elsewhere (tied weights)."""
    params, x = {"w": normal(4, 3, 2)}, normal(5, 4, 2)

    def fun(params: Any, x: Any) -> Any:
        return jnp.einsum("bik,iok->bko", x, params["w"])  # in 0, out 1, batch 2

    for in_axes, out_axes, stack in (
        ((0,), (1,), (2,)),
        ((1,), (0,), (2,)),
        ((0, 2), (1,), ()),
        ((2,), (1, 0), ()),
        ((1,), (2,), (0,)),
    ):
        layout = jl.Layout((4, 3, 2), in_axes, out_axes, stack)
        zeros = jl.LoraFactors(
            jnp.zeros(layout.a_shape(2)), jnp.zeros(layout.b_shape(2)), jnp.float32(1), layout
        )
        check_dense(fun, params, filled(jl.Adapter({"w": zeros})), x)


def test_no_contraction_at_all(normal: Any, filled: Any, check_dense: Any) -> None:
    layout = jl.Layout((4, 3), (0,), (1,))
    zeros = jl.LoraFactors(jnp.zeros((4, 2)), jnp.zeros((2, 3)), jnp.float32(1), layout)
    adapter = filled(jl.Adapter({"w": zeros}))
    check_dense(
        lambda p, x: jnp.einsum("b,io->bio", x, p["w"]), {"w": normal(4, 3)}, adapter, normal(5)
    )


def test_tied_embedding_reads_both_ways(normal: Any, planned: Any, check_dense: Any) -> None:
    def fun(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["w"]) @ params["w"].T

    params, x = {"w": normal(4, 3)}, normal(5, 4)
    check_dense(fun, params, planned(fun, params, x), x, tol=5e-6)


def test_the_smaller_of_two_adapted_weights_is_formed(
    normal: Any, planned: Any, check_dense: Any
) -> None:
    def fun(params: Any, x: Any) -> Any:
        return x @ (params["big"] @ params["small"])

    params, x = {"big": normal(6, 5), "small": normal(5, 2)}, normal(3, 6)
    adapter = planned(fun, params, x)
    check_dense(fun, params, adapter, x, strict=False, tol=5e-6)
    plan = jl.plan(fun, params, x, config=jl.LoraConfig(rank=2))
    formed = {path: target.materialized for path, target in plan.targets.items()}
    assert formed == {"big": (), "small": ("dot_general",)}
    with pytest.raises(jl.MaterializeError, match=r"small.*dot_general"):
        jl.apply(fun, strict=True)(params, adapter, x)


def test_a_weight_times_itself(normal: Any, planned: Any, check_dense: Any) -> None:
    def fun(params: Any, x: Any) -> Any:
        return x @ (params["w"] @ params["w"])

    params, x = {"w": normal(4, 4)}, normal(3, 4)
    adapter = planned(fun, params, x)
    check_dense(fun, params, adapter, x, strict=False, tol=5e-6)
    with pytest.raises(jl.MaterializeError, match=r"w: .*`dot_general`"):
        jl.apply(fun, strict=True)(params, adapter, x)


def _dots(jaxpr: Any) -> list[Any]:
    return [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]


@pytest.mark.parametrize("rows", [1, 1000])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_rank_is_reached_first(rows: int, transposed: bool, planned: Any) -> None:
    """``(x a) b`` and never ``x (a b)``, from either side, for one row as for many."""

    def fun(params: Any, x: Any) -> Any:
        return x @ (params["w"].T if transposed else params["w"])

    # Planned as x W throughout; used as x W or as x W^T.
    shape = jax.ShapeDtypeStruct
    params = {"w": shape((64, 48), jnp.float32)}
    adapter = planned(lambda p, x: x @ p["w"], params, shape((1, 64), jnp.float32))
    x = shape((rows, 48 if transposed else 64), jnp.float32)
    jaxpr = jax.make_jaxpr(jl.apply(fun, strict=True))(params, adapter, x).jaxpr
    shapes = [tuple(eqn.outvars[0].aval.shape) for eqn in _dots(jaxpr)]
    outputs = 64 if transposed else 48
    assert sorted(shapes) == sorted([(rows, outputs), (rows, 2), (rows, outputs)])


def test_precision_and_accumulation_are_those_of_the_base(planned: Any, normal: Any) -> None:
    def fun(params: Any, x: Any) -> Any:
        return lax.dot_general(
            x,
            params["w"],
            (((1,), (0,)), ((), ())),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    params, x = {"w": normal(4, 3).astype(jnp.bfloat16)}, normal(5, 4).astype(jnp.bfloat16)
    adapter = planned(fun, params, x)
    jaxpr = jax.make_jaxpr(jl.apply(fun, strict=True))(params, adapter, x).jaxpr
    highest = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
    assert [eqn.params["precision"] for eqn in _dots(jaxpr)] == [highest] * 3
    assert [eqn.params["preferred_element_type"] for eqn in _dots(jaxpr)] == [jnp.float32] * 3


def test_bf16_base_keeps_a_small_update(delta64: Any, filled: Any) -> None:
    """In bf16 ``W + dW`` rounds a small dW away; beside W it survives."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(256, 128)), jnp.bfloat16)
    x = jnp.asarray(rng.normal(size=(32, 256)), jnp.bfloat16)

    def fun(params: Any, x: Any) -> Any:
        return lax.dot_general(
            x, params["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )

    params = {"w": w}
    plan = jl.plan(fun, params, x, config=jl.LoraConfig(rank=4))
    adapter = filled(jl.init(jax.random.key(0), params, plan), scale=0.0005)
    assert adapter["w"].a.dtype == jnp.float32  # fp32 factors beside a bf16 base
    delta = delta64(adapter["w"])
    assert 5e-4 < np.std(delta) / np.std(np.asarray(w, np.float64)) < 2e-3
    want = np.asarray(x, np.float64) @ delta
    base = np.asarray(fun(params, x), np.float64)

    def error(out: Any) -> float:
        return float(np.linalg.norm(np.asarray(out, np.float64) - base - want)) / float(
            np.linalg.norm(want)
        )

    assert error(jl.apply(fun)(params, adapter, x)) < 0.01
    assert error(fun(jl.merge(params, adapter), x)) > 0.3  # what the factored form avoids


def test_bf16_throughout_is_within_its_rounding(
    normal: Any, planned: Any, check_dense: Any
) -> None:
    def fun(params: Any, x: Any) -> Any:
        return x @ params["w"]

    params, x = {"w": normal(16, 8).astype(jnp.bfloat16)}, normal(5, 16).astype(jnp.bfloat16)
    adapter = planned(fun, params, x)
    assert jl.apply(fun)(params, adapter, x).dtype == jnp.bfloat16
    # Six roundings to 8 bits (x a, its scale, a, b, the update, the sum), each 2^-9 of its size.
    check_dense(fun, params, adapter, x, tol=6 * 2**-9, grad=False)


def test_operands_of_two_dtypes(normal: Any, planned: Any, check_dense: Any) -> None:
    """lax mixes dtypes by itself, also where the user has forbidden jax.numpy to."""

    def fun(params: Any, x: Any) -> Any:
        return lax.dot_general(x, params["w"], (((1,), (0,)), ((), ())))

    params, x = {"w": normal(4, 3).astype(jnp.bfloat16)}, normal(5, 4)
    check_dense(fun, params, planned(fun, params, x), x, grad=False)


def test_low_rank_einsum_drops_an_axis_only_w_has(normal: Any) -> None:
    layout = jl.Layout((4, 3), (0,), (1,))
    factors = jl.LoraFactors(normal(4, 2), normal(2, 3), jnp.float32(0.5), layout)
    weight = virtual_weight(normal(4, 3), factors, "w")
    # A weight broadcast to [7, 4, 3], whose factors know nothing of its axis 0.
    jaxpr = jax.make_jaxpr(lambda w: jnp.broadcast_to(w, (7, 4, 3)))(weight.w)
    (wide,) = Interpreter(strict=True).run(jaxpr.jaxpr, jaxpr.consts, [weight])
    x = normal(5, 4)
    update = low_rank_einsum(Interpreter(), x, "bi", wide, "nio", "bno")
    assert update.shape == (5, 1, 3)
    want = 0.5 * np.asarray(x, np.float64) @ np.asarray(factors.a) @ np.asarray(factors.b)
    np.testing.assert_allclose(update[:, 0], want, rtol=0, atol=2e-6 * np.abs(want).max())


# The kernel's shape, the input's shape, and what is passed to conv_general_dilated.
_LAST_3D = ("NDHWC", "DHWIO", "NDHWC")
CONVS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1-d": ((3, 4, 5), (2, 7, 4), {"dimension_numbers": ("NWC", "WIO", "NWC")}),
    "2-d": ((3, 2, 4, 5), (2, 6, 7, 4), {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}),
    "3-d": ((2, 3, 2, 3, 4), (2, 4, 5, 4, 3), {"dimension_numbers": _LAST_3D}),
    "no window at all": ((5, 4), (3, 4), {"window_strides": (), "padding": ()}),
    "one by one": ((1, 1, 4, 5), (2, 3, 3, 4), {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}),
    "channels first": ((5, 4, 3, 2), (2, 4, 6, 7), {}),
    "odd layouts": (
        (4, 3, 5, 2),
        (6, 4, 2, 7),
        {"dimension_numbers": ("HCNW", "IHOW", "CWHN")},
    ),
    "strides": (
        (3, 3, 4, 5),
        (2, 7, 8, 4),
        {"window_strides": (2, 3), "dimension_numbers": ("NHWC", "HWIO", "NHWC")},
    ),
    "uneven padding": (
        (3, 4, 5),
        (2, 7, 4),
        {"padding": [(2, 0)], "dimension_numbers": ("NWC", "WIO", "NWC")},
    ),
    "valid": (
        (3, 4, 5),
        (2, 7, 4),
        {"padding": "VALID", "dimension_numbers": ("NWC", "WIO", "NWC")},
    ),
    "dilated kernel": (
        (3, 2, 4, 5),
        (2, 7, 6, 4),
        {"rhs_dilation": (2, 3), "dimension_numbers": ("NHWC", "HWIO", "NHWC")},
    ),
    "dilated input": (
        (3, 4, 5),
        (2, 5, 4),
        {"lhs_dilation": (2,), "padding": [(1, 2)], "dimension_numbers": ("NWC", "WIO", "NWC")},
    ),
    "grouped": (
        (3, 2, 6),
        (2, 7, 4),
        {"feature_group_count": 2, "dimension_numbers": ("NWC", "WIO", "NWC")},
    ),
    "grouped, channels first": ((6, 2, 3), (2, 6, 7), {"feature_group_count": 3}),
    "depthwise": (
        (3, 2, 1, 4),
        (2, 5, 6, 4),
        {"feature_group_count": 4, "dimension_numbers": ("NHWC", "HWIO", "NHWC")},
    ),
    "depthwise, two each": (
        (3, 1, 8),
        (2, 5, 4),
        {"feature_group_count": 4, "dimension_numbers": ("NWC", "WIO", "NWC")},
    ),
}


def _convolution(options: dict[str, Any], spatial: int) -> Any:
    options = {"window_strides": (1,) * spatial, "padding": "SAME", **options}

    def fun(params: Any, x: Any) -> Any:
        return lax.conv_general_dilated(x, params["w"], **options)

    return fun


def _adapter_for_all(fun: Any, params: Any, *args: Any, filled: Any) -> jl.Adapter:
    """As the fixture `planned`, but for whatever has a layout: not only linear layers."""
    plan = jl.plan(fun, params, *args, config=jl.LoraConfig(rank=2, targets=tuple(params)))
    return filled(jax.eval_shape(lambda: jl.init(jax.random.key(0), params, plan)))


@pytest.mark.parametrize("name", CONVS)
def test_convolutions(name: str, normal: Any, filled: Any, check_dense: Any) -> None:
    kernel, shape, options = CONVS[name]
    fun = _convolution(options, len(shape) - 2)
    params, x = {"w": normal(*kernel)}, normal(*shape)
    adapter = _adapter_for_all(fun, params, x, filled=filled)
    check_dense(fun, params, adapter, x, tol=4e-6)


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_transposed_convolutions(
    padding: str, transpose_kernel: bool, normal: Any, filled: Any, check_dense: Any
) -> None:
    def fun(params: Any, x: Any) -> Any:
        return lax.conv_transpose(
            x, params["w"], (2, 3), padding, transpose_kernel=transpose_kernel
        )

    features = (5, 4) if transpose_kernel else (4, 5)
    params, x = {"w": normal(3, 4, *features)}, normal(2, 4, 3, 4)
    adapter = _adapter_for_all(fun, params, x, filled=filled)
    assert adapter["w"].layout.out_axes == ((2,) if transpose_kernel else (3,))
    check_dense(fun, params, adapter, x, tol=4e-6)


def test_convolutions_of_a_scanned_and_cast_stack(
    normal: Any, filled: Any, check_dense: Any
) -> None:
    def fun(params: Any, x: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            w = w.transpose(1, 2, 0) / 2.0
            y = lax.conv_general_dilated(
                x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            )
            return jnp.tanh(y), None

        return lax.scan(layer, x, params["w"])[0]

    params, x = {"w": normal(3, 4, 3, 4)}, normal(2, 7, 4)
    adapter = _adapter_for_all(fun, params, x, filled=filled)
    assert adapter["w"].layout == jl.Layout((3, 4, 3, 4), (2, 3), (1,), (0,))
    check_dense(fun, params, adapter, x, tol=1e-5)


def _in_batch_groups(params: Any, x: Any) -> Any:
    return lax.conv_general_dilated(x, params["w"], (1,), "SAME", batch_group_count=2)


def _as_input(params: Any, x: Any) -> Any:
    return lax.conv_general_dilated(params["w"], x, (1,), "SAME")


@pytest.mark.parametrize(
    ("fun", "layout"),
    [
        (_in_batch_groups, jl.Layout((6, 4, 3), (1, 2), (0,))),
        (_as_input, jl.Layout((2, 4, 7), (1,), (0, 2))),
        # The factors do not split the window from the outputs: nothing can be convolved first.
        (_convolution({}, 1), jl.Layout((5, 4, 3), (1,), (0, 2))),
        (_convolution({}, 1), jl.Layout((5, 4, 3), (0, 2), (1,))),
    ],
)
def test_other_convolutions_are_formed(
    fun: Any, layout: jl.Layout, normal: Any, filled: Any, check_dense: Any
) -> None:
    zeros = jl.LoraFactors(
        jnp.zeros(layout.a_shape(2)), jnp.zeros(layout.b_shape(2)), jnp.float32(1), layout
    )
    x = normal(3, 4, 5) if fun is _as_input else normal(2, 4, 7)
    params, adapter = {"w": normal(*layout.shape)}, filled(jl.Adapter({"w": zeros}))
    check_dense(fun, params, adapter, x, strict=False, tol=4e-6)
    with pytest.raises(jl.MaterializeError, match=r"w: .*`conv_general_dilated`"):
        jl.apply(fun, strict=True)(params, adapter, x)


def test_a_convolution_reaches_the_rank_first(normal: Any, filled: Any) -> None:
    fun = _convolution({"dimension_numbers": ("NHWC", "HWIO", "NHWC")}, 2)
    params, x = {"w": normal(3, 3, 16, 24)}, normal(2, 8, 8, 16)
    adapter = _adapter_for_all(fun, params, x, filled=filled)
    jaxpr = jax.make_jaxpr(jl.apply(fun, strict=True))(params, adapter, x).jaxpr
    convs = [e for e in jaxpr.eqns if e.primitive.name == "conv_general_dilated"]
    kernels = [tuple(e.invars[1].aval.shape) for e in convs]
    assert kernels == [(3, 3, 16, 24), (3, 3, 16, 2), (1, 1, 2, 24)]
    assert _dots(jaxpr) == []


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_keeps_precision_and_accumulation(
    groups: int, normal: Any, filled: Any
) -> None:
    options = {"precision": lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    fun = _convolution(options | {"feature_group_count": groups}, 1)
    params = {"w": normal(6, 4 // groups, 3).astype(jnp.bfloat16)}
    x = normal(2, 4, 7).astype(jnp.bfloat16)
    adapter = _adapter_for_all(fun, params, x, filled=filled)
    jaxpr = jax.make_jaxpr(jl.apply(fun, strict=True))(params, adapter, x).jaxpr
    products = [
        e for e in jaxpr.eqns if "conv" in e.primitive.name and "dilated" in e.primitive.name
    ]
    products += _dots(jaxpr)
    assert len(products) == 3
    for eqn in products:
        assert eqn.params["preferred_element_type"] == jnp.float32
        assert eqn.params["precision"] == (lax.Precision.HIGHEST,) * 2


SIZES = {
    "some": (3, 2, 4),
    "an empty one": (5, 0, 4),
    "all in the last": (0, 0, 9),
    "rest": (2, 3, 1),
}


@pytest.mark.parametrize("name", SIZES)
def test_ragged_dot(name: str, normal: Any, planned: Any, check_dense: Any) -> None:
    """Rows beyond the last group ("rest") meet no expert."""

    def fun(params: Any, x: Any, sizes: Any) -> Any:
        return lax.ragged_dot(jnp.tanh(lax.ragged_dot(x, params["up"], sizes)), params["w"], sizes)

    params = {"up": normal(3, 6, 4), "w": normal(3, 4, 5)}
    args = normal(9, 6), jnp.asarray(SIZES[name], jnp.int32)
    adapter = planned(fun, params, *args)
    assert adapter["w"].layout == jl.Layout((3, 4, 5), (1,), (2,), (0,))
    check_dense(fun, params, adapter, *args, tol=5e-6)


def test_ragged_dot_of_a_transposed_weight(normal: Any, filled: Any, check_dense: Any) -> None:
    def fun(params: Any, x: Any, sizes: Any) -> Any:
        return lax.ragged_dot(x, params["w"].transpose(2, 1, 0), sizes)

    params, args = {"w": normal(5, 6, 3)}, (normal(9, 6), jnp.array([4, 3, 2], jnp.int32))
    adapter = _adapter_for_all(fun, params, *args, filled=filled)
    assert adapter["w"].layout == jl.Layout((5, 6, 3), (1,), (0,), (2,))
    check_dense(fun, params, adapter, *args)


def test_ragged_dot_with_one_factor_for_all_experts_is_formed(
    normal: Any, filled: Any, check_dense: Any
) -> None:
    def fun(params: Any, x: Any, sizes: Any) -> Any:
        return lax.ragged_dot(x, params["w"], sizes)

    params, args = {"w": normal(3, 6, 4)}, (normal(9, 6), jnp.array([4, 3, 2], jnp.int32))
    layout = jl.Layout((3, 6, 4), (0, 1), (2,))
    zeros = jl.LoraFactors(
        jnp.zeros(layout.a_shape(2)), jnp.zeros(layout.b_shape(2)), jnp.float32(1), layout
    )
    adapter = filled(jl.Adapter({"w": zeros}))
    check_dense(fun, params, adapter, *args, strict=False, tol=4e-6)
    with pytest.raises(jl.MaterializeError, match=r"w: .*`ragged_dot_general`"):
        jl.apply(fun, strict=True)(params, adapter, *args)
