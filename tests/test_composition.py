"""Adapted functions under JAX's transformations, where no other file looks at them.

`jit`, `grad` and the base's dtypes are in test_transform.py and models/, `vmap` over adapters,
`jvp` and second derivatives in interpreter/test_control.py, `jax.export` and donated buffers in
models/test_raw.py, devices in test_sharding.py and interpreter/test_sharding.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl

if hasattr(jax, "enable_x64"):
    _enable_x64 = jax.enable_x64
else:  # older versions
    from jax.experimental import enable_x64 as _enable_x64


def _model(params: Any, x: Any) -> Any:
    """Layers in a scan, and a head: ``x`` is one example or a batch."""
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]
    return x @ params["head"]


@pytest.fixture
def setup(normal: Any, planned: Any) -> tuple[Any, jl.Adapter, jax.Array]:
    params = {"layers": normal(3, 8, 8) / 3, "head": normal(8, 5)}
    x = normal(6, 8)
    return params, planned(_model, params, x), x


def _loss(params: Any, adapter: jl.Adapter, x: Any) -> jax.Array:
    return (jl.apply(_model, strict=True)(params, adapter, x) ** 2).sum()


def _assert_close(got: Any, want: Any, tol: float = 1e-5) -> None:
    for found, value in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        value = np.asarray(value)
        np.testing.assert_allclose(found, value, rtol=0, atol=tol * np.abs(value).max())


def test_eager_is_jitted(setup: Any, filled: Any) -> None:
    params, adapter, x = setup
    gradient = jax.value_and_grad(_loss, argnums=1)
    eager, jitted = gradient(params, adapter, x), jax.jit(gradient)(params, adapter, x)
    _assert_close(eager, jitted)
    with jax.disable_jit():
        _assert_close(_loss(params, adapter, x), jitted[0])
    with pytest.raises(AssertionError):  # negative control
        _assert_close(gradient(params, filled(adapter, seed=1), x), jitted)


def _products(fun: Any, *args: Any) -> list[tuple[tuple[int, ...], ...]]:
    """The shapes of the operands of every matrix product, those inside loops included."""
    found = []

    def walk(jaxpr: Any) -> None:
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                found.append(tuple(tuple(v.aval.shape) for v in eqn.invars))
            for inner in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
            ):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    walk(getattr(inner, "jaxpr", inner))

    walk(jax.make_jaxpr(fun)(*args).jaxpr)
    return found


def test_vmap_over_a_batch_is_the_batch(setup: Any) -> None:
    """Each example by itself: the same outputs from as many products, with one set of factors."""
    params, adapter, x = setup
    adapted = jl.apply(_model, strict=True)
    mapped = jax.vmap(adapted, in_axes=(None, None, 0))
    _assert_close(jax.jit(mapped)(params, adapter, x), jax.jit(adapted)(params, adapter, x))
    together = [sorted(shapes) for shapes in _products(adapted, params, adapter, x)]
    assert [sorted(s) for s in _products(mapped, params, adapter, x)] == together
    assert len(together) == 2 * 3
    # Negative control: with an adapter for each example the factors are stacked too.
    many = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(x)), adapter)
    each = _products(jax.vmap(adapted, in_axes=(None, 0, 0)), params, many, x)
    assert [sorted(s) for s in each] != together


def test_gradients_of_each_example(setup: Any) -> None:
    """``vmap`` of ``grad``: the rows' own gradients, whose sum is that of the batch."""
    params, adapter, x = setup
    each = jax.jit(jax.vmap(jax.grad(_loss, argnums=1), in_axes=(None, None, 0)))(
        params, adapter, x
    )
    whole = jax.jit(jax.grad(_loss, argnums=1))
    for rows in (slice(0, 1), slice(2, 3), slice(0, len(x))):
        wanted = jax.tree.leaves(whole(params, adapter, x[rows]))
        for found, want in zip(jax.tree.leaves(each), wanted, strict=True):
            size = np.abs(found).sum(0).max()  # of the scale, terms of a row may cancel
            np.testing.assert_allclose(found[rows].sum(0), want, rtol=0, atol=1e-5 * size)
    assert not np.allclose(each["head"].b[0], each["head"].b[1])


def test_checkpoint_around_the_adapted_function(setup: Any) -> None:
    """The same gradients, with the forward pass repeated in the backward one."""
    params, adapter, x = setup
    plain = jax.value_and_grad(_loss, argnums=1)
    remat = jax.value_and_grad(jax.checkpoint(_loss), argnums=1)
    _assert_close(jax.jit(remat)(params, adapter, x), jax.jit(plain)(params, adapter, x))
    saved = jax.checkpoint(_loss, policy=jax.checkpoint_policies.everything_saveable)
    keeping = jax.value_and_grad(saved, argnums=1)
    counts = [len(_products(g, params, adapter, x)) for g in (plain, remat, keeping)]
    assert counts[1] > counts[0] == counts[2]


def test_steps_in_a_scan(normal: Any, planned: Any) -> None:
    """Training with the adapter carried through a scan, beside the formulas in float64."""
    params, x, target = {"w": normal(6, 4)}, normal(5, 6), normal(5, 4, seed=2)
    adapter = planned(lambda p, x: x @ p["w"], params, x)
    adapted = jl.apply(lambda p, x: x @ p["w"], strict=True)
    rate, steps = 0.01, 4

    def step(adapter: jl.Adapter, _: None) -> tuple[jl.Adapter, jax.Array]:
        def loss(adapter: jl.Adapter) -> jax.Array:
            return 0.5 * ((adapted(params, adapter, x) - target) ** 2).sum()

        value, grads = jax.value_and_grad(loss)(adapter)
        f, g = adapter["w"], grads["w"]
        moved = dataclasses.replace(f, a=f.a - rate * g.a, b=f.b - rate * g.b)
        return jl.Adapter({"w": moved}), value

    trained, losses = jax.jit(lambda a: jax.lax.scan(step, a, length=steps))(adapter)

    f = adapter["w"]
    a, b, s, w, xs, ts = (
        np.asarray(v, np.float64) for v in (f.a, f.b, f.scale, params["w"], x, target)
    )
    wanted = []
    for _ in range(steps):
        error = xs @ w + s * xs @ a @ b - ts
        wanted.append(0.5 * (error**2).sum())
        a, b = a - rate * s * xs.T @ error @ b.T, b - rate * s * (xs @ a).T @ error
    _assert_close((losses, trained["w"].a, trained["w"].b), (np.array(wanted), a, b))
    assert wanted[-1] < 0.7 * wanted[0]
    np.testing.assert_array_equal(trained["w"].scale, f.scale)


# Dtypes of the base and of the factors, and a finer one, in which the error would be less.
DTYPES = {
    "bf16, factors in fp32": ("bfloat16", "float32", "float32"),
    "fp16, factors in fp32": ("float16", "float32", "float32"),
    "bf16 throughout": ("bfloat16", "bfloat16", "float32"),
    "fp32": ("float32", "float32", "float64"),
    "fp64, factors in fp32": ("float64", "float32", "float64"),
    "fp64": ("float64", "float64", None),
}


@pytest.mark.parametrize("name", DTYPES)
def test_outputs_and_gradients_in_every_dtype(name: str) -> None:
    """One layer: within four roundings of the formulas in float64, of the terms' absolute sum.

    ``y = x W + s x a b``, ``dA = s x^T g b^T``, ``dB = s (x a)^T g`` for the loss ``<y, g>``.
    """
    base, factors, finer = DTYPES[name]
    rng = np.random.default_rng(0)
    shapes = {"w": (16, 8), "x": (5, 16), "g": (5, 8), "b": (2, 8)}
    drawn = {key: rng.normal(size=shape) for key, shape in shapes.items()}

    def fun(params: Any, x: Any) -> Any:
        return x @ params["w"]

    with _enable_x64("float64" in base):
        w, x, g = (jnp.asarray(drawn[key], base) for key in "wxg")
        config = jl.LoraConfig(rank=2, alpha=3, dtype=factors)
        fresh = jl.init(jax.random.key(0), {"w": w}, jl.plan(fun, {"w": w}, x, config=config))
        f = dataclasses.replace(fresh["w"], b=jnp.asarray(drawn["b"], factors))
        adapted = jl.apply(fun, strict=True)

        def loss(adapter: jl.Adapter) -> Any:
            y = adapted({"w": w}, adapter, x)
            return (y * g).sum(), y

        grads, y = jax.jit(jax.grad(loss, has_aux=True))(jl.Adapter({"w": f}))
        got = {"y": y, "a": grads["w"].a, "b": grads["w"].b}
        dtypes = {key: str(value.dtype) for key, value in got.items()}
        got = {key: np.asarray(value).astype(np.float64) for key, value in got.items()}
        a, b, s, w, x, g = (np.asarray(v).astype(np.float64) for v in (f.a, f.b, f.scale, w, x, g))
    assert dtypes == {"y": base, "a": factors, "b": factors}

    def formulas(a: Any, b: Any, w: Any, x: Any, g: Any) -> dict[str, Any]:
        return {"y": x @ w + s * x @ a @ b, "a": s * x.T @ g @ b.T, "b": s * (x @ a).T @ g}

    wanted, sizes = formulas(a, b, w, x, g), formulas(*map(np.abs, (a, b, w, x, g)))
    for key, want in wanted.items():
        # A gradient is as coarse as the coarser of the base and the factors.
        coarse = base if key == "y" else max(base, factors, key=lambda name: jnp.finfo(name).eps)
        error = np.abs(got[key] - want)
        assert (error <= 4 * _rounding(coarse) * sizes[key]).all(), key
        if finer and coarse != finer:  # negative control
            assert (error > 4 * _rounding(finer) * sizes[key]).any(), key


def _rounding(dtype: str) -> float:
    return float(jnp.finfo(dtype).eps) / 2
