"""Weights cross jit, checkpoint, scan, vmap and differentiation in factored form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jax_lora as jl
from jax_lora.interpreter import Interpreter
from jax_lora.virtual import virtual_weight

STACK = {"w": (3, 4, 4)}
SQUARE = {"w": (4, 4)}


def _layer(x: Any, w: Any) -> Any:
    return jnp.tanh(x @ w)


def _scan(params: Any, x: Any, **options: Any) -> Any:
    return lax.scan(lambda x, w: (_layer(x, w), None), x, params["w"], **options)[0]


def _scan_ys(params: Any, x: Any) -> Any:
    def body(x: Any, w: Any) -> Any:
        y = _layer(x, w)
        return y, 2.0 * y

    x, ys = lax.scan(body, x, params["w"])
    return jnp.concatenate([x[None], ys])


def _scan_two_stacks(params: Any, x: Any) -> Any:
    def body(x: Any, layer: Any) -> Any:
        return jnp.tanh(x @ layer["up"]) @ layer["down"], None

    return lax.scan(body, x, params)[0]


def _loop_constant(params: Any, x: Any) -> Any:
    return lax.scan(lambda x, _: (_layer(x, params["w"]), None), x, None, length=3)[0]


def _carried_unchanged(params: Any, x: Any) -> Any:
    def body(carry: Any, _: Any) -> Any:
        x, w = carry
        return (_layer(x, w), w), None

    x, w = lax.scan(body, (x, params["w"]), None, length=3)[0]
    return x @ w


def _scan_over_experts_last(params: Any, x: Any) -> Any:
    return lax.scan(lambda x, w: (_layer(x, w), None), x, params["w"].transpose(2, 0, 1))[0]


def _scan_over_input_rows(params: Any, x: Any) -> Any:
    """The scanned axis is an input: only ``a`` is scanned, ``b`` is a constant of the loop."""

    def body(total: Any, row: Any) -> Any:
        x_i, w_i = row
        return total + jnp.einsum("b,o->bo", x_i, w_i), None

    return lax.scan(body, jnp.zeros_like(x), (x.T, params["w"]))[0]


def _nested_scan(params: Any, x: Any) -> Any:
    def outer(x: Any, ws: Any) -> Any:
        return lax.scan(lambda x, w: (_layer(x, w), None), x, ws)[0], None

    return lax.scan(outer, x, params["w"])[0]


def _fori(params: Any, x: Any) -> Any:
    return lax.fori_loop(0, 3, lambda i, x: _layer(x, params["w"][i]), x)


def _nested_jit(params: Any, x: Any) -> Any:
    inner = jax.jit(_layer)
    return jax.jit(lambda x, w: inner(inner(x, w), w.T))(x, params["w"])


def _returned_from_jit(params: Any, x: Any) -> Any:
    half = jax.jit(lambda w: (w.T / 2, w[:, :2]))
    turned, columns = half(params["w"])
    return x @ turned @ columns


def _remat(params: Any, x: Any) -> Any:
    layer = jax.checkpoint(_layer, policy=jax.checkpoint_policies.dots_saveable)
    return layer(layer(x, params["w"]), params["w"])


def _remat_returns_weight(params: Any, x: Any) -> Any:
    return x @ jax.checkpoint(lambda w: w.T)(params["w"])


def _scan_remat(params: Any, x: Any) -> Any:
    layer = jax.checkpoint(_layer, prevent_cse=False)
    return lax.scan(lambda x, w: (layer(x, w), None), x, params["w"])[0]


def _remat_scan(params: Any, x: Any) -> Any:
    return jax.checkpoint(_scan)(params, x)


def _vmapped_examples(params: Any, x: Any) -> Any:
    return jax.vmap(lambda row: _layer(row, params["w"]))(x)


def _vmapped_layers(params: Any, x: Any) -> Any:
    return jax.vmap(_layer, in_axes=(None, 0))(x, params["w"])


def _grad_inside(params: Any, x: Any) -> Any:
    return jax.grad(lambda x: _layer(x, params["w"]).sum())(x)


def _jvp_inside(params: Any, x: Any) -> Any:
    return jax.jvp(lambda x: _layer(x, params["w"]), (x,), (jnp.ones_like(x),))[1]


def _stacked_output(params: Any, x: Any) -> Any:
    def body(x: Any, w: Any) -> Any:
        return _layer(x, w), w.T

    x, turned = lax.scan(body, x, params["w"])
    return x @ turned[1]


def _outputs_of_other_scales(params: Any, x: Any) -> Any:
    """The weights of the steps have different scales, and b is a constant of the loop."""

    def body(x: Any, step: Any) -> Any:
        return x, params["w"][:, ::2] * step.astype(x.dtype)

    _, scaled = lax.scan(body, x, jnp.arange(3))
    return jnp.einsum("bi,sio->bso", x, scaled)


def _while(params: Any, x: Any) -> Any:
    def body(state: Any) -> Any:
        i, x = state
        return i + 1, _layer(x, params["w"])

    return lax.while_loop(lambda state: state[0] < 3, body, (0, x @ params["w"]))[1]


def _while_carried(params: Any, x: Any) -> Any:
    """The weight is carried unchanged, read by the condition and the body, and used afterwards."""

    def cond(state: Any) -> Any:
        i, x, w = state
        return (i < 3) & ((x @ w).sum() < 1e6)

    def body(state: Any) -> Any:
        i, x, w = state
        return i + 1, _layer(x, w), w

    _, x, w = lax.while_loop(cond, body, (0, x, params["w"]))
    return x @ w


def _while_condition(params: Any, x: Any) -> Any:
    """Only the condition reads the weight, as a constant of its own."""

    def cond(state: Any) -> Any:
        i, x = state
        return (i < 4) & (jnp.abs(x @ params["w"]).max() < 20)

    i, x = lax.while_loop(cond, lambda state: (state[0] + 1, 2 * state[1]), (0, x))
    return x @ params["w"] + i.astype(x.dtype)


def _fori_traced_bounds(params: Any, x: Any) -> Any:
    # A traced bound makes it a while loop.
    return lax.fori_loop(0, x.shape[0] - 2 + 0 * x[0, 0].astype(int), _step(params["w"]), x)


def _step(w: Any) -> Any:
    return lambda i, x: _layer(x, w[i])


def _cond(params: Any, x: Any) -> Any:
    y = x @ params["w"]
    return lax.cond(y.sum() > 0, lambda w: y @ w, lambda w: y @ w.T, params["w"])


def _cond_other_branch(params: Any, x: Any) -> Any:
    y = x @ params["w"]
    return lax.cond(y.sum() <= 0, lambda w: y @ w, lambda w: y @ w.T, params["w"])


def _switch(params: Any, x: Any) -> Any:
    branches = [lambda x: x @ params["w"][0], jnp.sin, lambda x: _layer(x, params["w"][2].T)]
    return sum(lax.switch(jnp.int32(k), branches, x) for k in range(4))  # 3 is clamped to 2


FACTORED: dict[str, tuple[dict[str, Any], Callable[[Any, Any], Any]]] = {
    "scan": (STACK, _scan),
    "scan in reverse": (STACK, lambda p, x: _scan(p, x, reverse=True)),
    "scan unrolled": (STACK, lambda p, x: _scan(p, x, unroll=2)),
    "scan with outputs": (STACK, _scan_ys),
    "scan over two stacks": ({"up": (3, 4, 5), "down": (3, 5, 4)}, _scan_two_stacks),
    "loop constant": (SQUARE, _loop_constant),
    "carried unchanged": (SQUARE, _carried_unchanged),
    "stack axis last": ({"w": (4, 4, 3)}, _scan_over_experts_last),
    "nested scan": ({"w": (2, 3, 4, 4)}, _nested_scan),
    "fori_loop indexing a stack": (STACK, _fori),
    "nested jit": (SQUARE, _nested_jit),
    "weight returned from jit": (SQUARE, _returned_from_jit),
    "remat with a policy": (SQUARE, _remat),
    "remat returns the weight": (SQUARE, _remat_returns_weight),
    "scan of remat": (STACK, _scan_remat),
    "remat of scan": (STACK, _remat_scan),
    "vmap over examples": (SQUARE, _vmapped_examples),
    "vmap over layers": (STACK, _vmapped_layers),
    "stacked output": (STACK, _stacked_output),
    "stacked outputs of other scales": (SQUARE, _outputs_of_other_scales),
    "cond": (SQUARE, _cond),
    "cond, other branch": (SQUARE, _cond_other_branch),
    "switch": (STACK, _switch),
    "grad inside": (SQUARE, _grad_inside),
    "jvp inside": (SQUARE, _jvp_inside),
}


@pytest.mark.parametrize("name", FACTORED)
def test_stays_factored(name: str, normal: Any, planned: Any, check_dense: Any) -> None:
    shapes, fun = FACTORED[name]
    params, x = {path: normal(*shape) / 2 for path, shape in shapes.items()}, normal(5, 4)
    adapter = planned(fun, params, x)
    assert set(adapter) == set(shapes)
    check_dense(fun, params, adapter, x, tol=5e-6)


WHILES: dict[str, tuple[dict[str, Any], Callable[[Any, Any], Any]]] = {
    "constant": (SQUARE, _while),
    "carried": (SQUARE, _while_carried),
    "condition": (SQUARE, _while_condition),
    "traced bounds": (STACK, _fori_traced_bounds),
}


@pytest.mark.parametrize("name", WHILES)
def test_while_stays_factored(name: str, normal: Any, planned: Any, check_dense: Any) -> None:
    """JAX differentiates a while loop forwards only."""
    shapes, fun = WHILES[name]
    params, x = {path: normal(*shape) / 2 for path, shape in shapes.items()}, normal(5, 4)
    adapter = planned(fun, params, x)
    check_dense(fun, params, adapter, x, tol=5e-6, grad=False)


def test_scan_over_an_input_axis(normal: Any, filled: Any, check_dense: Any) -> None:
    layout = jl.Layout((4, 4), (0,), (1,))
    zeros = jl.LoraFactors(jnp.zeros((4, 2)), jnp.zeros((2, 4)), jnp.float32(1), layout)
    adapter = filled(jl.Adapter({"w": zeros}))
    check_dense(_scan_over_input_rows, {"w": normal(4, 4)}, adapter, normal(5, 4), tol=5e-6)


# What JAX offers no way through in factored form: the primitives noted in the plan, and fun.
def _carried_and_changed(params: Any, x: Any) -> Any:
    def body(carry: Any, _: Any) -> Any:
        x, w = carry
        return (_layer(x, w), 0.5 * w), None

    return lax.scan(body, (x, params["w"]), None, length=3)[0][0]


def _cond_returns_the_weight(params: Any, x: Any) -> Any:
    y = x @ params["w"]
    return y @ lax.cond(y.sum() > 0, lambda w: w.T, lambda w: 2.0 * w, params["w"])


def _while_changed(params: Any, x: Any) -> Any:
    def body(state: Any) -> Any:
        i, x, w = state
        return i + 1, _layer(x, w), 0.5 * w

    return lax.while_loop(lambda state: state[0] < 3, body, (0, x, params["w"]))[1]


def _cond_on_a_weight(params: Any, x: Any) -> Any:
    y = x @ params["w"]
    return lax.cond(params["w"][0, 0] > 0, lambda y: -y, jnp.sin, y)


@jax.custom_vjp
def _scaled_gradient(x: Any, w: Any) -> Any:
    return x @ w


_scaled_gradient.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g)
)


@jax.custom_jvp
def _product(x: Any, w: Any) -> Any:
    return x @ w


@_product.defjvp
def _product_jvp(primals: Any, tangents: Any) -> Any:
    return primals[0] @ primals[1], tangents[0] @ primals[1] + primals[0] @ tangents[1]


FORMED: dict[str, tuple[dict[str, Any], tuple[str, ...], bool, Callable[[Any, Any], Any]]] = {
    "carried and changed": (SQUARE, ("scan carry",), True, _carried_and_changed),
    "carried by a while and changed": (SQUARE, ("while carry",), False, _while_changed),
    "returned by a branch": (SQUARE, ("cond output",), True, _cond_returns_the_weight),
    "condition of a cond": (SQUARE, ("gt",), True, _cond_on_a_weight),
    "custom_vjp": (SQUARE, ("custom_vjp_call",), True, lambda p, x: _scaled_gradient(x, p["w"])),
    "custom_jvp": (SQUARE, ("custom_jvp_call",), True, lambda p, x: _product(x, p["w"])),
    "inside a jit": (SQUARE, ("sin",), True, jax.jit(lambda p, x: x @ p["w"] @ jnp.sin(p["w"]))),
    "inside a scan": (
        STACK,
        ("sin",),
        True,
        lambda p, x: lax.scan(lambda x, w: (x @ w @ jnp.sin(w), None), x, p["w"])[0],
    ),
}


@pytest.mark.parametrize("name", FORMED)
def test_formed_where_it_has_to_be(name: str, normal: Any, planned: Any, check_dense: Any) -> None:
    shapes, primitives, grad, fun = FORMED[name]
    params, x = {path: normal(*shape) / 2 for path, shape in shapes.items()}, normal(5, 4)
    adapter = planned(fun, params, x)
    check_dense(fun, params, adapter, x, strict=False, grad=grad, tol=5e-6)
    target = jl.plan(fun, params, x, config=jl.LoraConfig(rank=2)).targets["w"]
    assert target.materialized == primitives
    with pytest.raises(jl.MaterializeError, match=f"w: .*`{primitives[0]}`"):
        jl.apply(fun, strict=True)(params, adapter, x)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, also those of inner jaxprs."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def _named(jaxpr: Any, *names: str) -> list[Any]:
    return [eqn for eqn in _equations(jaxpr.jaxpr) if eqn.primitive.name in names]


def test_a_carry_that_older_versions_do_not_hoist_is_a_constant(normal: Any, planned: Any) -> None:
    """Newer versions of JAX turn an unchanged carry into a constant by themselves."""
    params, x = {"w": normal(4, 4)}, normal(5, 4)

    def changing(x: Any, w: Any) -> Any:
        return lax.scan(lambda c, _: ((_layer(c[0], c[1]), -c[1]), None), (x, w), None, 3)[0][0]

    closed = jax.make_jaxpr(changing)(x, params["w"])
    (scan,) = closed.jaxpr.eqns
    body = scan.params["jaxpr"]
    (k,) = [k for k, v in enumerate(body.jaxpr.invars) if v.aval.shape == (4, 4)]
    kept = [body.jaxpr.invars[k] if v.aval.shape == (4, 4) else v for v in body.jaxpr.outvars]
    unchanged = body.replace(jaxpr=body.jaxpr.replace(outvars=kept))
    jaxpr = closed.jaxpr.replace(eqns=[scan.replace(params={**scan.params, "jaxpr": unchanged})])
    factors = planned(lambda p, x: x @ p["w"], params, x)["w"]
    weight = virtual_weight(params["w"], factors, "w")
    (got,) = Interpreter(strict=True).run(jaxpr, closed.consts, [x, weight])
    dense = weight.materialize()
    np.testing.assert_allclose(
        got, _layer(_layer(_layer(x, dense), dense), dense), rtol=0, atol=1e-5
    )
    with pytest.raises(jl.MaterializeError, match=r"w: .*`scan carry`"):  # negative control
        Interpreter(strict=True).run(closed.jaxpr, closed.consts, [x, weight])


def test_a_function_called_twice_is_one_inner_function(normal: Any, planned: Any) -> None:
    inner = jax.jit(_layer)

    def fun(params: Any, x: Any) -> Any:
        return inner(inner(x, params["w"]), params["w"])

    params, x = {"w": normal(4, 4)}, normal(5, 4)
    adapter = planned(fun, params, x)
    jits = [
        eqn
        for eqn in _named(jax.make_jaxpr(jl.apply(fun))(params, adapter, x), "jit", "pjit")
        if eqn.params["name"] == "_layer"
    ]
    assert len(jits) == 2
    assert jits[0].params["jaxpr"] is jits[1].params["jaxpr"]


def test_weights_that_a_scan_returns_leak_no_tracers(normal: Any, planned: Any) -> None:
    params, x = {"w": normal(3, 4, 4)}, normal(5, 4)
    adapter = planned(_stacked_output, params, x)
    with jax.checking_leaks():
        jax.make_jaxpr(jl.apply(_stacked_output, strict=True))(params, adapter, x)


def test_jit_shardings_are_kept(normal: Any, planned: Any, check_dense: Any) -> None:
    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
    by_row = NamedSharding(mesh, PartitionSpec("d", None))
    by_column = NamedSharding(mesh, PartitionSpec(None, "d"))

    def fun(params: Any, x: Any) -> Any:
        dense = jax.jit(_layer, in_shardings=(None, by_column), out_shardings=by_row)
        return dense(x, params["w"])

    params, x = {"w": normal(4, 4)}, normal(5, 4)
    adapter = planned(fun, params, x)
    jaxpr = jax.make_jaxpr(jl.apply(fun, strict=True))(params, adapter, x)
    named = [eqn.params["sharding"].spec for eqn in _named(jaxpr, "sharding_constraint")]
    assert by_column.spec in named
    assert by_row.spec in named
    check_dense(fun, params, adapter, x)


def test_remat_keeps_its_policy_and_saves_as_much(normal: Any, planned: Any) -> None:
    """The policy decides what the backward pass recomputes, so it shows in the number of dots."""
    policies = jax.checkpoint_policies

    def dots(policy: Any, *, with_policy: bool = True) -> int:
        def layer(x: Any, w: Any) -> Any:
            return jnp.tanh(jnp.tanh(x @ w) @ w)

        def fun(params: Any, x: Any) -> Any:
            wrapped = jax.checkpoint(layer, policy=policy) if with_policy else layer
            return wrapped(x, params["w"]).sum()

        params, x = {"w": normal(4, 4)}, normal(5, 4)
        adapter = planned(fun, params, x)
        adapted = jl.apply(fun, strict=True)
        remats = _named(
            jax.make_jaxpr(adapted)(params, adapter, x), "checkpoint", "remat", "remat2"
        )
        assert [eqn.params["policy"] for eqn in remats] == ([policy] if with_policy else [])
        jaxpr = jax.make_jaxpr(jax.grad(adapted, argnums=1))(params, adapter, x)
        return len(_named(jaxpr, "dot_general"))

    everything = dots(policies.everything_saveable)
    nothing = dots(policies.nothing_saveable)
    assert everything == dots(None, with_policy=False)
    assert nothing > everything


def test_custom_gradients_of_activations_survive(normal: Any, planned: Any) -> None:
    """A function that no weight enters keeps its rule, here seven times the true gradient."""

    @jax.custom_vjp
    def seven(x: Any) -> Any:
        return x

    seven.defvjp(lambda x: (x, None), lambda _, g: (7.0 * g,))

    def fun(params: Any, x: Any, through: Any) -> Any:
        return through(x @ params["w"]).sum()

    params, x = {"w": normal(4, 3)}, normal(5, 4)
    adapter = planned(lambda p, x: fun(p, x, seven), params, x)

    def gradient(through: Any) -> Any:
        adapted = jl.apply(lambda p, x: fun(p, x, through), strict=True)
        return jax.grad(adapted, argnums=1)(params, adapter, x)["w"]

    got, plain = gradient(seven), gradient(lambda x: x)
    np.testing.assert_allclose(got.a, 7 * plain.a, rtol=1e-5)
    np.testing.assert_allclose(got.b, 7 * plain.b, rtol=1e-5)


def _batched(adapters: list[jl.Adapter]) -> jl.Adapter:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)


def test_vmap_over_adapters_keeps_the_base_product_unbatched(
    normal: Any, planned: Any, dense64: Any
) -> None:
    def fun(params: Any, x: Any) -> Any:
        return x @ params["w"]

    params, x = {"w": normal(16, 8)}, normal(5, 16)
    adapters = [planned(fun, params, x, seed=seed) for seed in range(3)]
    many = jax.vmap(jl.apply(fun, strict=True), in_axes=(None, 0, None))
    got = many(params, _batched(adapters), x)
    for out, adapter in zip(got, adapters, strict=True):
        want = np.asarray(x, np.float64) @ dense64(params, adapter)["w"]
        np.testing.assert_allclose(out, want, rtol=0, atol=2e-6 * np.abs(want).max())
    assert not np.allclose(got[0], got[1])

    def weight_space(params: Any, adapter: Any, x: Any) -> Any:
        return fun(jl.merge(params, adapter), x)

    def operands(fun: Any) -> list[tuple[int, ...]]:
        batched = jax.vmap(fun, in_axes=(None, 0, None))
        dots = _named(jax.make_jaxpr(batched)(params, _batched(adapters), x), "dot_general")
        return [tuple(v.aval.shape) for eqn in dots for v in eqn.invars]

    shapes = operands(jl.apply(fun))
    assert shapes.count((16, 8)) == 1
    assert not [s for s in shapes if len(s) == 3 and {16, 8} <= set(s)]
    # Negative control: three dense copies of the weight.
    shapes = operands(weight_space)
    assert [s for s in shapes if len(s) == 3 and {16, 8} <= set(s)]


def test_vmap_over_examples_with_an_adapter_each(normal: Any, planned: Any, dense64: Any) -> None:
    """One batch, another adapter for each row: what serves many tasks at once."""
    params, x = {"w": normal(3, 4, 4) / 2}, normal(2, 5, 4)
    adapters = [planned(_scan, params, x[0], seed=seed) for seed in range(2)]
    adapted = jl.apply(_scan, strict=True)
    got = jax.jit(jax.vmap(adapted, in_axes=(None, 0, 0)))(params, _batched(adapters), x)
    for out, adapter, rows in zip(got, adapters, x, strict=True):
        want = np.asarray(rows, np.float64)
        for w in dense64(params, adapter)["w"]:
            want = np.tanh(want @ w)
        np.testing.assert_allclose(out, want, rtol=0, atol=1e-5)


def test_jvp(normal: Any, planned: Any, delta64: Any) -> None:
    """Forward mode in every argument at once: ``d(x W + s x a b)`` written out."""

    def fun(params: Any, x: Any) -> Any:
        return x @ params["w"]

    params, x = {"w": normal(6, 4)}, normal(5, 6)
    adapter = planned(fun, params, x)
    f = adapter["w"]
    dot = {name: normal(*getattr(f, name).shape, seed=9) for name in ("a", "b")}
    tangent = jl.Adapter({"w": dataclasses.replace(f, **dot, scale=jnp.float32(0.25))})
    dx, dw = normal(5, 6, seed=8), normal(6, 4, seed=8)
    _, got = jax.jvp(jl.apply(fun, strict=True), (params, adapter, x), ({"w": dw}, tangent, dx))
    a, b, da, db, xs, dxs, w, dws = (
        np.asarray(v, np.float64) for v in (f.a, f.b, dot["a"], dot["b"], x, dx, params["w"], dw)
    )
    s = float(f.scale)
    want = dxs @ (w + s * a @ b) + xs @ dws + s * xs @ (da @ b + a @ db) + 0.25 * xs @ a @ b
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_the_hessian_of_the_adapter_is_that_of_the_dense_model(normal: Any, planned: Any) -> None:
    """Forward over reverse, through a scan: the second derivative along one direction."""
    params, x = {"w": normal(3, 4, 4) / 2}, normal(5, 4)
    adapter = planned(_scan, params, x)

    def second(loss: Any) -> float:
        gradient = jax.grad(loss)
        return jax.jit(lambda a: jax.jvp(gradient, (a,), (a,))[1]["w"].b)(adapter)

    got = second(lambda a: jl.apply(_scan, strict=True)(params, a, x).sum())
    want = second(lambda a: _scan(jl.merge(params, a), x).sum())
    assert np.abs(want).max() > 1e-2
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
