"""`apply`: identity at the start, the dense model afterwards, at the price of the factors alone."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_lora as jl

WIDTHS = (96, 128, 80, 40)
Model = Callable[..., jax.Array]


def mlp(params: Any, x: jax.Array) -> jax.Array:
    for k in range(3):
        x = x @ params[f"l{k}"]["kernel"] + params[f"l{k}"]["bias"]
        x = jax.nn.relu(x) if k < 2 else x
    return x


def stack(params: Any, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ w), None

    return lax.scan(layer, x, params["w"])[0]


@pytest.fixture(scope="module")
def models(normal: Any) -> dict[str, tuple[Model, Any, jax.Array]]:
    params = {
        f"l{k}": {"kernel": normal(n, m) / np.float32(np.sqrt(n)), "bias": normal(m)}
        for k, (n, m) in enumerate(itertools.pairwise(WIDTHS))
    }
    deep = {"w": normal(5, 48, 48) / 8}
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    return {
        "mlp": (mlp, params, normal(16, 96)),
        "stack": (stack, deep, normal(16, 48)),
        "mlp in bf16": (mlp, half, normal(16, 96).astype(jnp.bfloat16)),
    }


def _fresh(fun: Model, params: Any, x: jax.Array, rank: int = 4) -> jl.Adapter:
    plan = jl.plan(fun, params, x, config=jl.LoraConfig(rank=rank, alpha=2 * rank))
    return jl.init(jax.random.key(0), params, plan)


@pytest.mark.parametrize("name", ["mlp", "stack", "mlp in bf16"])
def test_an_untrained_adapter_is_the_identity_bit_for_bit(
    name: str, models: Any, filled: Any
) -> None:
    fun, params, x = models[name]
    adapter = _fresh(fun, params, x)
    assert all(np.asarray(f.a).any() and not np.asarray(f.b).any() for f in adapter.values())
    adapted = jax.jit(jl.apply(fun, strict=True))
    want = jax.jit(fun)(params, x)
    np.testing.assert_array_equal(adapted(params, adapter, x), want)
    # Negative control: any b that is not zero shows.
    changed = adapted(params, filled(adapter), x)
    assert (np.asarray(changed) != np.asarray(want)).mean() > 0.9
    for path in adapter:
        one = {**adapter, path: filled(adapter)[path]}
        assert (np.asarray(adapted(params, jl.Adapter(one), x)) != np.asarray(want)).any()


@pytest.mark.parametrize("name", ["mlp", "stack"])
def test_apply_is_the_dense_model(name: str, models: Any, filled: Any, check_dense: Any) -> None:
    fun, params, x = models[name]
    adapter = filled(_fresh(fun, params, x), scale=0.05)
    check_dense(fun, params, adapter, x, tol=1e-5)
    # And what merge makes, to rounding.
    got = jax.jit(jl.apply(fun))(params, adapter, x)
    merged = jax.jit(fun)(jl.merge(params, adapter), x)
    np.testing.assert_allclose(got, merged, rtol=0, atol=2e-5 * np.abs(merged).max())


def test_gradients_of_one_layer_in_closed_form(normal: Any, planned: Any) -> None:
    """``y = x W + s x A B``: ``dA = s x^T g B^T`` and ``dB = s (x A)^T g`` for ``L = <y, g>``."""
    params, x, g = {"w": normal(6, 4)}, normal(5, 6), normal(5, 4, seed=2)

    def fun(params: Any, x: Any) -> Any:
        return x @ params["w"]

    adapter = planned(fun, params, x)
    adapted = jl.apply(fun, strict=True)
    got = jax.grad(lambda adapter: (adapted(params, adapter, x) * g).sum())(adapter)["w"]
    f = adapter["w"]
    x, g, a, b, s = (np.asarray(v, np.float64) for v in (x, g, f.a, f.b, f.scale))
    np.testing.assert_allclose(got.a, s * x.T @ g @ b.T, rtol=0, atol=5e-6 * np.abs(g).max() * 10)
    np.testing.assert_allclose(got.b, s * (x @ a).T @ g, rtol=0, atol=5e-6 * np.abs(g).max() * 10)


@pytest.mark.parametrize("name", ["mlp", "stack"])
def test_at_the_start_only_b_has_a_gradient(name: str, models: Any, filled: Any) -> None:
    fun, params, x = models[name]
    adapter = _fresh(fun, params, x)

    @jax.jit
    def gradient(adapter: jl.Adapter) -> jl.Adapter:
        return jax.grad(lambda a: (jl.apply(fun)(params, a, x) ** 2).sum())(adapter)

    for factors in gradient(adapter).values():
        assert not np.asarray(factors.a).any()
        assert np.asarray(factors.b).any()
    for factors in gradient(filled(adapter)).values():  # negative control
        assert np.asarray(factors.a).any()


def test_the_base_is_never_changed(models: Any, filled: Any) -> None:
    fun, params, x = models["mlp"]
    before = jax.tree.map(lambda leaf: np.array(leaf), params)
    leaves = jax.tree.leaves(params)
    adapter = filled(_fresh(fun, params, x))
    jax.jit(jl.apply(fun))(params, adapter, x)
    merged = jl.merge(params, adapter)
    jl.unmerge(merged, adapter)
    assert all(now is then for now, then in zip(jax.tree.leaves(params), leaves, strict=True))
    jax.tree.map(np.testing.assert_array_equal, params, before)
    # Only the adapted weights of the merged tree differ.
    assert merged["l0"]["bias"] is params["l0"]["bias"]
    assert (np.asarray(merged["l0"]["kernel"]) != np.asarray(params["l0"]["kernel"])).any()


def test_the_base_is_differentiable_too(models: Any, filled: Any, dense64: Any) -> None:
    """With respect to W, the gradient is that of the dense model at ``W + s a b``."""
    fun, params, x = models["mlp"]
    adapter = filled(_fresh(fun, params, x), scale=0.05)
    got = jax.jit(jax.grad(lambda p: jl.apply(fun)(p, adapter, x).sum()))(params)
    dense = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), dense64(params, adapter))
    want = jax.jit(jax.grad(lambda p: fun(p, x).sum()))(dense)
    for found, value in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(found, value, rtol=0, atol=5e-5 * np.abs(value).max())


def test_one_compilation_serves_all_adapters_and_scales(models: Any, filled: Any) -> None:
    fun, params, x = models["mlp"]
    traces = []

    def counted(params: Any, x: Any) -> Any:
        traces.append(x.shape)
        return fun(params, x)

    adapted = jax.jit(jl.apply(counted))
    first = filled(_fresh(fun, params, x), seed=1)
    outs = [adapted(params, first, x), adapted(params, filled(first, seed=2), x)]
    for scale in (0.0, 2.5):
        scaled = {p: dataclasses.replace(f, scale=jnp.float32(scale)) for p, f in first.items()}
        outs.append(adapted(params, jl.Adapter(scaled), x))
    assert len(traces) == 1
    assert not any(np.array_equal(outs[0], out) for out in outs[1:])
    np.testing.assert_array_equal(outs[2], jax.jit(fun)(params, x))  # scale 0
    # Negative control: another rank is another program.
    adapted(params, _fresh(fun, params, x, rank=3), x)
    assert len(traces) == 2


def test_scale_is_linear_and_not_baked_in(normal: Any, planned: Any) -> None:
    def fun(params: Any, x: Any) -> Any:
        return x @ params["w"]

    params, x = {"w": normal(6, 4)}, normal(5, 6)
    adapter = planned(fun, params, x)
    adapted = jax.jit(jl.apply(fun))

    def update(scale: float) -> np.ndarray:
        f = dataclasses.replace(adapter["w"], scale=jnp.float32(scale))
        return np.asarray(adapted(params, jl.Adapter({"w": f}), x) - fun(params, x))

    np.testing.assert_allclose(update(-3.0), -3 * update(1.0), rtol=0, atol=1e-4)
    assert np.abs(update(1.0)).max() > 1


def test_leaves_that_are_not_arrays_reach_the_function_as_they_are(
    normal: Any, planned: Any, check_dense: Any
) -> None:
    seen = []

    def fun(params: Any, x: Any, train: bool, *, name: str = "no", power: int = 1) -> Any:
        seen.append((train, name, power, params["act"]))
        y = params["act"](x @ params["w"]) ** power
        return {"y": -y if train else y, "name": name, "train": train, "nothing": None}

    params, x = {"w": normal(6, 4), "act": jnp.tanh, "eps": 1e-5}, normal(5, 6)
    plan = jl.plan(fun, params, x, True, config=jl.LoraConfig(rank=2), name="yes", power=2)
    assert list(plan.targets) == ["w"]
    assert plan.base_params == 24
    adapter = jl.init(jax.random.key(0), params, plan)
    out = jl.apply(fun)(params, adapter, x, True, name="yes", power=2)
    assert {(train, name, power) for train, name, power, _ in seen} == {(True, "yes", 2)}
    assert all(act is jnp.tanh for *_, act in seen)
    assert (out["name"], out["train"], out["nothing"]) == ("yes", True, None)
    np.testing.assert_array_equal(out["y"], -(jnp.tanh(x @ params["w"]) ** 2))


def test_numpy_parameters_and_tuples(normal: Any, planned: Any, check_dense: Any) -> None:
    def fun(params: Any, x: Any) -> Any:
        return x @ params[0][0] + params[1]

    params, x = ([np.asarray(normal(6, 4))], np.asarray(normal(4))), normal(5, 6)
    adapter = planned(fun, params, x)
    assert list(adapter) == ["0/0"]
    check_dense(fun, params, adapter, x)


def test_the_adapted_function_keeps_name_and_doc() -> None:
    def model(params: Any, x: Any) -> Any:
        """My model."""
        return x @ params["w"]

    adapted = jl.apply(model)
    assert (adapted.__name__, adapted.__doc__) == ("model", "My model.")


def test_an_unadapted_parameter_is_an_ordinary_array(normal: Any) -> None:
    def fun(params: Any, x: Any) -> Any:
        return jnp.sin(params["free"]) @ x @ params["w"]

    params, x = {"w": normal(6, 4), "free": normal(5, 5)}, normal(5, 6)
    config = jl.LoraConfig(rank=2, targets="w")
    adapter = jl.init(jax.random.key(0), params, jl.plan(fun, params, x, config=config))
    np.testing.assert_array_equal(jl.apply(fun, strict=True)(params, adapter, x), fun(params, x))


def test_strict_names_the_parameter_and_the_primitive(normal: Any, planned: Any) -> None:
    def fun(params: Any, x: Any) -> Any:
        return x @ params["net"]["kernel"] + jnp.cumsum(params["net"]["kernel"], axis=0)[-1]

    params, x = {"net": {"kernel": normal(4, 3)}}, normal(5, 4)
    adapter = planned(fun, params, x)
    with pytest.raises(jl.MaterializeError, match=r"net/kernel: .*`cumsum`.* \(4, 3\)"):
        jl.apply(fun, strict=True)(params, adapter, x)
    np.testing.assert_allclose(
        jl.apply(fun)(params, adapter, x), fun(jl.merge(params, adapter), x), rtol=0, atol=1e-5
    )


def test_a_weight_that_is_returned_is_formed(normal: Any, planned: Any, dense64: Any) -> None:
    def fun(params: Any, x: Any) -> Any:
        return x @ params["w"], params["w"].T

    params, x = {"w": normal(6, 4)}, normal(5, 6)
    adapter = planned(fun, params, x)
    _, weight = jl.apply(fun)(params, adapter, x)
    np.testing.assert_allclose(weight, dense64(params, adapter)["w"].T, rtol=0, atol=1e-5)
    with pytest.raises(jl.MaterializeError, match=r"w: .*`function output`"):
        jl.apply(fun, strict=True)(params, adapter, x)


def test_an_adapter_for_other_parameters_is_refused(models: Any) -> None:
    fun, params, x = models["mlp"]
    adapter = _fresh(fun, params, x)
    renamed = {"l0": params["l0"], "l1": params["l1"], "last": params["l2"]}
    with pytest.raises(jl.AdapterError, match=r"l2/kernel: no such parameter \(nearest: 'l"):
        jl.apply(fun)(renamed, adapter, x)


def test_printing_inside_a_model_is_no_obstacle(
    normal: Any, planned: Any, check_dense: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    def fun(params: Any, x: Any) -> Any:
        y = x @ params["w"]
        jax.debug.print("sum {}", y.sum())
        jax.debug.print("weight {}", params["w"].sum())
        return y

    params, x = {"w": normal(6, 4)}, normal(5, 6)
    check_dense(fun, params, planned(fun, params, x), x, strict=False)
    jax.effects_barrier()
    assert "sum " in capfd.readouterr().out


def test_jit_counts_and_names_the_adapter_among_the_arguments(normal: Any, filled: Any) -> None:
    def fun(params: Any, x: Any, train: bool = False) -> Any:
        return (x @ params["w"]) * (2.0 if train else 1.0)

    params, x = {"w": normal(6, 4)}, normal(3, 6)
    plan = jl.plan(fun, params, x, config=jl.LoraConfig(rank=2))
    adapter = filled(jl.init(jax.random.key(0), params, plan))
    adapted = jl.apply(fun)
    assert list(inspect.signature(adapted).parameters) == ["params", "adapter", "x", "train"]
    plain = adapted(params, adapter, x)
    np.testing.assert_allclose(
        jax.jit(adapted, static_argnums=3)(params, adapter, x, True), 2 * plain, rtol=1e-6
    )
    named = jax.jit(adapted, static_argnames="train")
    np.testing.assert_allclose(named(params, adapter, x, True), 2 * plain, rtol=1e-6)
    jaxpr = jax.make_jaxpr(jax.jit(adapted, donate_argnames="x"))(params, adapter, x)
    donated = jaxpr.jaxpr.eqns[0].params["donated_invars"]
    assert [i for i, given in enumerate(donated) if given] == [len(donated) - 1]  # x, the last leaf


def test_a_function_without_a_telling_signature_is_adapted_too(normal: Any, filled: Any) -> None:
    def fun(*args: Any) -> Any:
        return args[1] @ args[0]["w"]

    params, x = {"w": normal(6, 4)}, normal(3, 6)
    plan = jl.plan(fun, params, x, config=jl.LoraConfig(rank=2))
    adapter = filled(jl.init(jax.random.key(0), params, plan))
    got = jax.jit(jl.apply(fun))(params, adapter, x)
    np.testing.assert_allclose(got, fun(jl.merge(params, adapter), x), rtol=1e-5, atol=1e-5)


def test_arguments_of_another_type_are_refused_by_name(normal: Any) -> None:
    def fun(params: Any, x: Any) -> Any:
        return x @ params["w"]

    params, x = {"w": normal(6, 4)}, normal(3, 6)
    plan = jl.plan(fun, params, x, config=jl.LoraConfig(rank=2))
    for wrong in (None, plan, {"w": 1}):
        with pytest.raises(jl.AdapterError, match=r"expected an adapter .*Adapter\), got"):
            jl.apply(fun)(params, wrong, x)
    with pytest.raises(jl.AdapterError, match=r"expected a configuration .*LoraConfig\), got dict"):
        jl.plan(fun, params, x, config={"rank": 2})
    with pytest.raises(jl.AdapterError, match=r"expected a plan .*Plan\), got LoraConfig"):
        jl.init(jax.random.key(0), params, jl.LoraConfig())


def test_what_is_no_function_is_refused(normal: Any) -> None:
    params, x = {"w": normal(6, 4)}, normal(3, 6)
    expected = r"expected a function of parameters first, such as model.apply, got dict"
    for call in (jl.apply, lambda p: jl.plan(p, params, x), lambda p: jl.discover(p, params, x)):
        with pytest.raises(jl.ConfigError, match=expected):
            call(params)


def test_a_configuration_among_the_arguments_is_refused(normal: Any) -> None:
    with pytest.raises(jl.ConfigError, match=r"got a LoraConfig; pass config=\.\.\. by name"):
        jl.plan(lambda p, x: x @ p["w"], {"w": normal(6, 4)}, normal(3, 6), jl.LoraConfig())
