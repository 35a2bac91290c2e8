"""What a product with an adapted weight does: factored, formed, or what is counted cheaper."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_lora as jl
from jax_lora.interpreter.cost import Product


def _dense(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["w"]) @ p["v"]


def _conv(p: Any, x: Any) -> Any:
    y = lax.conv_general_dilated(
        x.reshape(1, 4, 8), p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return y.reshape(4, -1)


def _experts(p: Any, x: Any) -> Any:
    return lax.ragged_dot(x, p["w"], jnp.array([1, 0, 3], jnp.int32))


def _lookup(p: Any, x: Any) -> Any:
    ids = jnp.arange(4) % 3
    return x @ p["w"][ids].T


def _scanned(p: Any, x: Any) -> Any:
    def step(x: Any, w: Any) -> Any:
        return jnp.tanh(x @ w), None

    return lax.scan(jax.checkpoint(step), x, p["w"])[0]


MODELS: dict[str, tuple[Any, dict[str, tuple[int, ...]]]] = {
    "dense": (_dense, {"w": (8, 6), "v": (6, 5)}),
    "convolution": (_conv, {"w": (3, 8, 6)}),
    "experts": (_experts, {"w": (3, 8, 6)}),
    "lookup": (_lookup, {"w": (5, 8)}),
    "scanned": (_scanned, {"w": (3, 8, 8)}),
}


@pytest.mark.parametrize("mode", ["materialize", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_every_mode_is_the_dense_model(
    name: str, mode: Any, normal: Any, filled: Any, check_dense: Any, monkeypatch: Any
) -> None:
    fun, shapes = MODELS[name]
    params = {path: normal(*shape) / 3 for path, shape in shapes.items()}
    x = normal(4, 8)
    plan = jl.plan(fun, params, x, config=jl.LoraConfig(rank=2, targets=tuple(shapes)))
    adapter = filled(jl.init(jax.random.key(0), params, plan))
    apply = jl.apply
    # Strict is about what cannot stay factored, not about what is asked for.
    monkeypatch.setattr(jl, "apply", lambda fun, strict: apply(fun, strict=True, mode=mode))
    check_dense(fun, params, adapter, x, tol=5e-6)


def _sums(compiled: Any, shape: tuple[int, ...]) -> int:
    """Instructions that add arrays of a shape."""
    sizes = ",".join(map(str, shape))
    return len(re.findall(rf"f32\[{sizes}\]\S* add\(", compiled.as_text()))


def _gradient(fun: Any, params: Any, adapter: Any, x: Any, mode: Any) -> Any:
    def loss(adapter: Any, params: Any, x: Any) -> Any:
        return (jl.apply(fun, mode=mode)(params, adapter, x) ** 2).sum()

    return jax.jit(jax.grad(loss)).lower(adapter, params, x).compile()


def test_the_weight_is_formed_where_it_is_asked_for(normal: Any, planned: Any) -> None:
    params, x = {"w": normal(24, 40), "v": normal(40, 16)}, normal(4, 24)
    adapter = planned(_dense, params, x)
    factored = _gradient(_dense, params, adapter, x, "factored")
    assert (_sums(factored, (24, 40)), _sums(factored, (40, 16))) == (0, 0)
    formed = _gradient(_dense, params, adapter, x, "materialize")
    assert _sums(formed, (24, 40)) > 0
    assert _sums(formed, (40, 16)) > 0
    one = _gradient(_dense, params, adapter, x, {"v": "materialize"})
    assert _sums(one, (24, 40)) == 0
    assert _sums(one, (40, 16)) > 0


def test_a_formed_weight_is_no_residual(normal: Any, planned: Any) -> None:
    """Of a scan over layers the backward pass forms each weight again, and keeps no stack."""

    def model(p: Any, x: Any) -> Any:
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    params, x = {"w": normal(16, 64, 64) / 8}, normal(2, 64)
    adapter = planned(model, params, x)
    stack = 16 * 64 * 64 * 4

    def temporaries(loss: Any) -> int:
        compiled = jax.jit(jax.grad(loss)).lower(adapter, params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    formed = temporaries(lambda a, p: jl.apply(model, mode="materialize")(p, a, x).sum())
    assert formed < stack / 2
    # Negative control: in weight space the sum is a stack, and so is its gradient.
    assert temporaries(lambda a, p: model(jl.merge(p, a), x).sum()) > stack


@pytest.mark.parametrize(
    ("rows", "rank", "form"), [(256, 1, False), (256, 8, False), (256, 96, True), (2048, 64, True)]
)
def test_auto_takes_what_the_compiler_counts_less_for(
    rows: int, rank: int, form: bool, normal: Any
) -> None:
    def model(p: Any, x: Any) -> Any:
        # An input that depends on an adapted weight, so that its gradient is needed.
        return jnp.tanh(x @ p["first"]) @ p["w"]

    params = {"first": normal(128, 128), "w": normal(128, 128)}
    x = normal(rows, 128)
    config = jl.LoraConfig(rank=rank, targets=("first", "w"), mode="auto")
    plan = jl.plan(model, params, x, config=config)
    adapter = jl.init(jax.random.key(0), params, plan)
    (decided,) = plan.targets["w"].decided
    assert decided.startswith("formed" if form else "factored")
    assert f"auto: {decided}" in str(plan)
    assert set(plan.modes.values()) == {"auto"}

    flops = {
        mode: _gradient(model, params, adapter, x, mode).cost_analysis()["flops"]
        for mode in ("factored", "materialize")
    }
    assert (flops["materialize"] < flops["factored"]) == form
    chosen = _gradient(model, params, adapter, x, plan.modes)
    assert chosen.cost_analysis()["flops"] == min(flops.values())


def test_the_count_of_operations_is_that_of_the_compiled_program(normal: Any) -> None:
    """Of both forms, for one product whose input needs a gradient too."""
    rows, fan_in, fan_out, rank = 512, 96, 160, 16
    w, a, b = normal(fan_in, fan_out), normal(fan_in, rank), normal(rank, fan_out)
    x = normal(rows, fan_in)

    def flops(product: Any) -> float:
        def loss(x: Any, a: Any, b: Any) -> Any:
            return (product(x, a, b) ** 2).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, a, b).compile()
        return float(compiled.cost_analysis()["flops"])

    base = flops(lambda x, a, b: x @ w)
    factored = flops(lambda x, a, b: x @ w + (x @ a) @ b)
    formed = flops(lambda x, a, b: x @ (w + a @ b))
    # Without bytes: they are not the compiler's business.
    counted = Product(rows * fan_in, rows, fan_in, fan_out, rank, itemsize=0)
    np.testing.assert_allclose(counted.factored, factored - base, rtol=0.02)
    # This one keeps a b for the backward pass instead of forming it twice.
    once = counted.formed - 2 * fan_in * fan_out * rank
    np.testing.assert_allclose(once, formed - base, rtol=0.02)


def test_modes_that_are_none_are_refused(normal: Any, planned: Any) -> None:
    with pytest.raises(jl.ConfigError, match="expected mode to be one of factored, materialize"):
        jl.apply(_dense, mode="atuo")  # type: ignore[arg-type]
    params, x = {"w": normal(8, 6), "v": normal(6, 5)}, normal(4, 8)
    adapter = planned(_dense, params, x)
    with pytest.raises(jl.ConfigError, match=r"'W'.*'w'"):
        jl.apply(_dense, mode={"W": "auto"})(params, adapter, x)


def test_dropout_acts_on_products_that_stay_factored(normal: Any, planned: Any) -> None:
    params, x = {"w": normal(8, 6), "v": normal(6, 5)}, normal(4, 8)
    adapter = planned(_dense, params, x, rank=5)
    dropped = jl.dropout(adapter, jax.random.key(0), 0.5)
    want = jl.apply(_dense)(params, dropped, x)
    np.testing.assert_array_equal(jl.apply(_dense, mode="auto")(params, dropped, x), want)
    with pytest.raises(jl.MaterializeError, match="dropout"):
        jl.apply(_dense, mode="materialize")(params, dropped, x)
