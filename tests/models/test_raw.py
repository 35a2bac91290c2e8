"""Functions of arrays, without a framework."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import jax_lora as jl

W = {"w": (8, 8)}
STACK = {"w": (3, 8, 8)}


def _experts(p: Any, x: Any) -> Any:
    hidden = jax.nn.silu(jnp.einsum("ebd,edf->ebf", x, p["up"]))
    return jnp.einsum("ebf,efd->ebd", hidden, p["down"])


def _routed(p: Any, x: Any) -> Any:
    """A mixture of experts: a router, the chosen experts by ragged products, and its weight."""
    probabilities = jax.nn.softmax(x @ p["router"])
    order = jnp.argsort(jnp.argmax(x @ jnp.ones((8, 3), x.dtype) + jnp.arange(3.0), axis=1))
    sizes = jnp.array([1, 0, 6], jnp.int32)
    hidden = jnp.tanh(lax.ragged_dot(jnp.take(x, order, axis=0), p["up"], sizes))
    return lax.ragged_dot(hidden, p["down"], sizes) * probabilities[:, :1]


def _dispatched(p: Any, x: Any) -> Any:
    """Each row has an expert of its own, picked by an index."""
    expert = jnp.arange(x.shape[0]) % 3
    return jnp.einsum("bd,bdf->bf", x, p["w"][expert])


def _with_a_term(p: Any, x: Any) -> Any:
    return x @ (p["w"] + jnp.tri(8, dtype=x.dtype))


def _tied_head(p: Any, ids: Any) -> Any:
    x = p["table"][ids]
    return (x + jnp.tanh(x @ p["w"])) @ p["table"].T


def _fori(p: Any, x: Any) -> Any:
    def step(i: Any, x: Any) -> Any:
        return jnp.tanh(x @ lax.dynamic_index_in_dim(p["w"], i, 0, keepdims=False))

    return lax.fori_loop(0, 3, step, x)


def _unrolled_in_reverse(p: Any, x: Any) -> Any:
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"], reverse=True, unroll=3)[0]


def _map_over_layers(p: Any, x: Any) -> Any:
    return lax.map(lambda w: x @ w, p["w"])


def _jit_inside(p: Any, x: Any) -> Any:
    layer = jax.jit(lambda x, w: jax.nn.relu(x @ w))
    return layer(layer(x, p["w"][0]), p["w"][1])


def _grad_inside(p: Any, x: Any) -> Any:
    return jax.vmap(jax.grad(lambda x: jnp.tanh(x @ p["w"]).sum()))(x)


def _jvp_inside(p: Any, x: Any) -> Any:
    return jax.jvp(lambda x: jnp.tanh(x @ p["w"]), (x,), (x,))[1]


def _fused_qkv(p: Any, x: Any) -> Any:
    q, k, v = jnp.split(p["w"], 3, axis=-1)
    return jax.nn.softmax((x @ q) @ (x @ k).T) @ (x @ v)


def _fused_heads(p: Any, x: Any) -> Any:
    return jnp.einsum("bd,dhk->bhk", x, p["w"].reshape(8, 2, 4))


def _scaled(p: Any, x: Any) -> Any:
    return x @ (p["w"] * 0.5 / jnp.sqrt(jnp.asarray(8.0, x.dtype)))


def _embedded_patches(p: Any, x: Any) -> Any:
    """Convolution, then attention-like products, then a pooled head."""
    y = lax.conv_general_dilated(
        x.reshape(1, 4, 8), p["conv"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return y.mean(1) @ p["head"]


FACTORED: dict[str, tuple[dict[str, tuple[int, ...]], Callable[..., Any], Any]] = {
    "experts by einsum": ({"up": (3, 8, 5), "down": (3, 5, 8)}, _experts, (3, 4, 8)),
    "experts by ragged_dot": (
        {"router": (8, 3), "up": (3, 8, 5), "down": (3, 5, 8)},
        _routed,
        (7, 8),
    ),
    "experts by index": (STACK, _dispatched, (5, 8)),
    "sum with a term of no input": (W, _with_a_term, (4, 8)),
    "tied head": ({"table": (11, 8), "w": (8, 8)}, _tied_head, np.array([[3, 0], [10, 3]])),
    "fori_loop with a dynamic slice": (STACK, _fori, (4, 8)),
    "unrolled scan in reverse": (STACK, _unrolled_in_reverse, (4, 8)),
    "map over layers": (STACK, _map_over_layers, (4, 8)),
    "jit inside": (STACK, _jit_inside, (4, 8)),
    "grad inside": (W, _grad_inside, (4, 8)),
    "jvp inside": (W, _jvp_inside, (4, 8)),
    "fused qkv": ({"w": (8, 24)}, _fused_qkv, (4, 8)),
    "fused heads": (W, _fused_heads, (4, 8)),
    "scaled weight": (W, _scaled, (4, 8)),
    "convolution and head": ({"conv": (3, 8, 6), "head": (6, 5)}, _embedded_patches, (4, 8)),
}


@pytest.mark.parametrize("name", FACTORED)
def test_factored(name: str, normal: Any, check_model: Any, factored: Any) -> None:
    shapes, fun, x = FACTORED[name]
    params = {path: normal(*shape) / 3 for path, shape in shapes.items()}
    x = normal(*x) if isinstance(x, tuple) else jnp.asarray(x)
    # XLA multiplies by a transposed sum with another kernel than by a transposed product.
    exact = name != "fused qkv"
    check_model(fun, params, x, sites=factored(*shapes), exact=exact)


@jax.custom_vjp
def _own_gradient(x: Any, w: Any) -> Any:
    return x @ w


_own_gradient.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g)
)


def _product_of_weights(p: Any, x: Any) -> Any:
    return x @ (p["w"] @ p["v"])


def _concatenated(p: Any, x: Any) -> Any:
    return x @ jnp.concatenate([p["w"], p["v"]], axis=1) + (x @ p["w"] * (x @ p["v"])).sum()


def _penalised(p: Any, x: Any) -> Any:
    return x @ p["w"] + jnp.sum(p["w"] ** 2)


def _normalised(p: Any, x: Any) -> Any:
    return x @ p["w"] + x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0))


FORMED: dict[str, tuple[dict[str, Any], Callable[..., Any], dict[str, tuple[str, ...]]]] = {
    "custom_vjp": (W, lambda p, x: _own_gradient(x, p["w"]), {"w": ("custom_vjp_call",)}),
    "product of weights": (
        {"w": (8, 7), "v": (7, 4)},
        _product_of_weights,
        {"w": (), "v": ("dot_general",)},
    ),
    "concatenated weights": (
        {"w": (8, 5), "v": (8, 5)},
        _concatenated,
        {"w": ("concatenate",), "v": ("concatenate",)},
    ),
    "L2 penalty": (W, _penalised, {"w": ("integer_pow",)}),
}


@pytest.mark.parametrize("name", FORMED)
def test_formed(name: str, normal: Any, check_model: Any) -> None:
    shapes, fun, sites = FORMED[name]
    params = {path: normal(*shape) / 3 for path, shape in shapes.items()}
    if name == "L2 penalty" and "square" in str(jax.make_jaxpr(fun)(params, normal(4, 8))):
        sites = {"w": ("square",)}
    check_model(fun, params, normal(4, 8), sites=sites)


def test_weight_normalisation_is_formed(normal: Any, check_model: Any) -> None:
    """The norm needs W, and so does the quotient; ``x W`` beside them stays factored."""
    params, x = {"w": normal(8, 8)}, normal(4, 8)
    plan = jl.plan(_normalised, params, x, config=jl.LoraConfig(rank=2))
    formed = plan.targets["w"].materialized
    assert "div" in formed
    check_model(_normalised, params, x, sites={"w": formed})


def test_printing_is_kept(
    normal: Any, check_model: Any, factored: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    def fun(p: Any, x: Any) -> Any:
        jax.debug.print("x0={x}", x=x[0, 0])
        return x @ p["w"]

    params, x = {"w": normal(8, 8)}, normal(4, 8)
    adapter = check_model(fun, params, x, sites=factored("w"))
    jax.effects_barrier()
    capfd.readouterr()
    jax.jit(jl.apply(fun))(params, adapter, x)
    jax.effects_barrier()
    assert capfd.readouterr().out.count("x0=") == 1


def test_eagerly_python_may_branch_on_what_is_not_traced(
    normal: Any, planned: Any, dense64: Any
) -> None:
    """The function is traced, also eagerly: a branch on numpy's values is fine."""
    flag = np.asarray(1.0)

    def fun(p: Any, x: Any) -> Any:
        return x @ p["w"] if flag > 0 else x

    params, x = {"w": normal(8, 8)}, normal(4, 8)
    adapter = planned(fun, params, x)
    got = jl.apply(fun, strict=True)(params, adapter, x)
    want = np.asarray(x, np.float64) @ dense64(params, adapter)["w"]
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-6 * np.abs(want).max())


def test_eagerly_too_a_branch_on_an_argument_is_the_error_of_jax(normal: Any, planned: Any) -> None:
    def fun(p: Any, x: Any) -> Any:
        return x @ p["w"] if x.sum() > 0 else x

    params, x = {"w": normal(8, 8)}, normal(4, 8)
    adapter = planned(lambda p, x: x @ p["w"], params, x)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jl.apply(fun)(params, adapter, x)


def test_export(normal: Any, planned: Any) -> None:
    """An adapted function is exported like any other, the adapter's arrays as arguments."""

    def fun(p: Any, x: Any) -> Any:
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    params, x = {"w": normal(3, 8, 8) / 3}, normal(4, 8)
    adapter = planned(fun, params, x)
    leaves, treedef = jax.tree.flatten(adapter)

    def flat(params: Any, leaves: Any, x: Any) -> Any:
        return jl.apply(fun, strict=True)(params, jax.tree.unflatten(treedef, leaves), x)

    restored = export.export(jax.jit(flat))(params, leaves, x)
    if importlib.util.find_spec("flatbuffers"):
        restored = export.deserialize(restored.serialize())
    want = jl.apply(fun)(params, adapter, x)
    np.testing.assert_allclose(restored.call(params, leaves, x), want, rtol=0, atol=1e-6)
    other = [2 * leaf for leaf in leaves]  # nothing of the adapter is baked in
    want = jl.apply(fun)(params, jax.tree.unflatten(treedef, other), x)
    np.testing.assert_allclose(restored.call(params, other, x), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["factored", "auto"])
def test_export_for_any_batch(mode: Any, normal: Any, planned: Any) -> None:
    def fun(p: Any, x: Any) -> Any:
        return jnp.tanh(x @ p["w"]) @ p["v"]

    params, x = {"w": normal(8, 6), "v": normal(6, 5)}, normal(4, 8)
    adapter = planned(fun, params, x)
    leaves, treedef = jax.tree.flatten(adapter)

    def flat(params: Any, leaves: Any, x: Any) -> Any:
        return jl.apply(fun, strict=True, mode=mode)(params, treedef.unflatten(leaves), x)

    (n,) = export.symbolic_shape("n")
    any_batch = jax.ShapeDtypeStruct((n, 8), x.dtype)
    exported = export.export(jax.jit(flat))(params, leaves, any_batch)
    for rows in (x, x[:3]):
        want = jl.apply(fun)(params, adapter, rows)
        np.testing.assert_allclose(exported.call(params, leaves, rows), want, rtol=0, atol=1e-6)
    with pytest.raises(jl.ConfigError, match=r"sizes are numbers, got one of shape \(n, 8\)"):
        jl.plan(fun, params, any_batch)


def test_donated_buffers(normal: Any, planned: Any) -> None:
    def fun(p: Any, x: Any) -> Any:
        return x @ p["w"]

    params, x = {"w": normal(8, 8)}, normal(4, 8)
    adapter = planned(fun, params, x)
    want = jl.apply(fun)(params, adapter, x)

    def step(adapter: Any, params: Any, x: Any) -> Any:
        out = jl.apply(fun, strict=True)(params, adapter, x)
        return jax.tree.map(lambda leaf: leaf * 1.0, adapter), out

    donated = jax.tree.map(jnp.copy, adapter)
    after, got = jax.jit(step, donate_argnums=0)(donated, params, x)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
    jax.tree.map(np.testing.assert_array_equal, after, adapter)
    assert not params["w"].is_deleted()


MANY = {
    "convolution": (
        {"w": (3, 4, 6)},
        lambda p, x: lax.conv_general_dilated(
            x, p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        (2, 5, 4),
    ),
    "grouped convolution": (
        {"w": (3, 2, 6)},
        lambda p, x: lax.conv_general_dilated(
            x,
            p["w"],
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=2,
        ),
        (2, 5, 4),
    ),
    "embedding": ({"w": (9, 4)}, lambda p, i: p["w"][i], np.array([[3, 0], [8, 3]])),
    "experts by einsum": ({"up": (3, 8, 5), "down": (3, 5, 8)}, _experts, (3, 4, 8)),
    "experts by index": (STACK, _dispatched, (5, 8)),
    "cond": (
        W,
        lambda p, x: lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: jnp.sin(x @ w.T), p["w"]),
        (4, 8),
    ),
    "while": (
        W,
        lambda p, x: lax.while_loop(
            lambda s: (s[0] < 3) & ((s[1] @ p["w"]).sum() < 1e6),
            lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"])),
            (0, x),
        )[1],
        (4, 8),
    ),
}


@pytest.mark.parametrize("name", MANY)
def test_vmap_over_adapters(name: str, normal: Any, filled: Any) -> None:
    """Many adapters at once: as one after the other, with the base unbatched."""
    shapes, fun, x = MANY[name]
    params = {path: normal(*shape) / 3 for path, shape in shapes.items()}
    x = normal(*x) if isinstance(x, tuple) else jnp.asarray(x)
    config = jl.LoraConfig(rank=2, targets=tuple(shapes))
    plan = jl.plan(fun, params, x, config=config)
    fresh = jl.init(jax.random.key(0), params, plan)
    adapters = [filled(fresh, seed) for seed in range(3)]
    many = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    adapted = jl.apply(fun, strict=True)

    @jax.jit
    def everything(many: Any) -> Any:
        together = jax.vmap(adapted, in_axes=(None, 0, None))(params, many, x)
        one_by_one = [
            fun(jl.merge(params, jax.tree.map(lambda leaf, k=k: leaf[k], many)), x)
            for k in range(3)
        ]
        return together, one_by_one

    got, want = everything(many)
    assert not np.allclose(got[0], got[1])
    np.testing.assert_allclose(got, np.stack(want), rtol=0, atol=1e-5 * np.abs(want).max())


def test_vmap_over_adapters_of_ragged_products(normal: Any, planned: Any) -> None:
    """JAX has no batching rule for ragged_dot in every version: right, or a clear error of JAX."""

    def fun(p: Any, x: Any) -> Any:
        return lax.ragged_dot(x, p["w"], jnp.array([1, 0, 3], jnp.int32))

    params, x = {"w": normal(3, 8, 5)}, normal(4, 8)
    adapters = [planned(fun, params, x, seed=seed) for seed in range(2)]
    many = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    batched = jax.vmap(jl.apply(fun, strict=True), in_axes=(None, 0, None))
    try:
        got = batched(params, many, x)
    except NotImplementedError:
        return
    for out, adapter in zip(got, adapters, strict=True):
        want = fun(jl.merge(params, adapter), x)
        np.testing.assert_allclose(out, want, rtol=0, atol=1e-5)
