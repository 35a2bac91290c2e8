"""Values trained whole: parameters of any kind, and rows of tables."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_lora as jl


def _net(p: Any, x: Any) -> Any:
    x = x @ p["l1"]["kernel"] + p["l1"]["bias"]
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True)) * p["norm"]
    return x @ p["head"]["kernel"] + p["head"]["bias"]


@pytest.fixture
def net(normal: Any) -> Any:
    layer = {"kernel": normal(6, 5), "bias": normal(5)}
    head = {"kernel": normal(5, 3), "bias": normal(3)}
    return {"l1": layer, "norm": normal(5), "head": head}


MIXED = (
    jl.Rule("**/bias", variant="full"),
    jl.Rule("norm", variant="full"),
    jl.Rule("head/**", variant="full"),
    "all-linear",
)


def test_biases_norms_and_heads_beside_lora(net: Any, normal: Any, started: Any) -> None:
    x = normal(4, 6)
    adapter = started(_net, net, x, targets=MIXED)
    kinds = {path: entry.NAME for path, entry in adapter.items()}
    assert kinds == {
        "head/bias": "full",
        "head/kernel": "full",
        "l1/bias": "full",
        "l1/kernel": "lora",
        "norm": "full",
    }
    assert adapter.trainable_params == 3 + 15 + 5 + (6 * 2 + 2 * 5) + 5
    adapted = jl.apply(_net, strict=True)
    np.testing.assert_array_equal(jax.jit(adapted)(net, adapter, x), jax.jit(_net)(net, x))

    def loss(adapter: Any) -> Any:
        return (adapted(net, adapter, x) ** 2).sum()

    optimizer = jl.optim.lora_optimizer(optax.sgd(0.01))
    grads = jax.grad(loss)(adapter)
    updates, _ = optimizer.update(grads, optimizer.init(adapter), adapter)
    now = optax.apply_updates(adapter, updates)
    # A step of full training of these, as the model itself would make it.
    want = jax.grad(lambda p: (_net(p, x) ** 2).sum())(net)
    for path in ("norm", "head/bias", "head/kernel", "l1/bias"):
        part, whole = want, net
        for name in path.split("/"):
            part, whole = part[name], whole[name]
        step = np.asarray(whole, np.float64) - 0.01 * np.asarray(part, np.float64)
        np.testing.assert_allclose(now[path].value, step, rtol=0, atol=1e-5)
        assert (np.asarray(now[path].value) != np.asarray(whole)).any()
    merged = jl.merge(net, now)
    assert merged["norm"].tobytes() == now["norm"].value.tobytes()


def test_the_value_is_a_copy_that_may_be_donated(net: Any, normal: Any, started: Any) -> None:
    config = jl.LoraConfig(targets=jl.Rule("norm", variant="full"))
    plan = jl.plan(_net, net, normal(4, 6), config=config)
    adapter = jl.init(jax.random.key(0), net, plan)  # eagerly: no copy is made by compiling
    jax.jit(lambda a: jax.tree.map(lambda leaf: leaf + 1, a), donate_argnums=0)(adapter)
    assert adapter["norm"].value.is_deleted()
    assert not net["norm"].is_deleted()


def test_a_master_copy_in_float32_gathers_steps_that_bfloat16_would_lose(
    normal: Any, started: Any
) -> None:
    params = {"w": normal(4), "v": normal(4, 4)}
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)

    def fun(p: Any, x: Any) -> Any:
        return (x * p["w"]) @ p["v"]

    x = normal(3, 4).astype(jnp.bfloat16)
    adapter = started(fun, params, x, targets=jl.Rule("w", variant="full"))
    value = adapter["w"].value
    assert value.dtype == jnp.float32
    assert jl.apply(fun)(params, adapter, x).dtype == jnp.bfloat16
    small = 2.0**-10 * jnp.abs(value)  # an eighth of a bfloat16's spacing, or less
    for _ in range(16):
        value = value + small
    moved = jl.Adapter({"w": dataclasses.replace(adapter["w"], value=value)})
    assert (jl.merge(params, moved)["w"] != params["w"]).all()
    lost = params["w"] + small.astype(jnp.bfloat16)
    np.testing.assert_array_equal(lost, params["w"])  # negative control
    # A wider base keeps its width, whatever the dtype of the factors.
    wide = {"w": normal(4), "v": normal(4, 4)}
    narrow = started(
        fun, wide, normal(3, 4), targets=jl.Rule("w", variant="full", dtype="bfloat16")
    )
    assert narrow["w"].value.dtype == jnp.float32


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_any_shape(shape: Any, normal: Any, started: Any, stirred: Any) -> None:
    params, x = {"w": normal(*shape)}, normal(3)

    def fun(p: Any, x: Any) -> Any:
        return jnp.sin(p["w"]).sum() + x

    fresh = started(fun, params, x, targets=jl.Rule("w", variant="full"))
    adapter = stirred(fresh)
    assert fresh["w"].shape == shape
    got = jl.apply(fun, strict=True)(params, adapter, x)
    np.testing.assert_allclose(got, fun({"w": adapter["w"].value}, x), rtol=0, atol=1e-6)
    delta = jl.delta(adapter, params)["w"]
    want = np.asarray(adapter["w"].value, np.float64) - np.asarray(params["w"], np.float64)
    np.testing.assert_allclose(delta, want, rtol=0, atol=1e-6)


def test_the_base_s_gradient_is_zero(net: Any, normal: Any, started: Any) -> None:
    """A parameter that is replaced has no say."""
    adapter = started(_net, net, normal(4, 6), targets=MIXED)
    grads = jax.grad(lambda p: (jl.apply(_net)(p, adapter, normal(4, 6)) ** 2).sum())(net)
    assert not np.asarray(grads["norm"]).any()
    assert np.asarray(grads["l1"]["kernel"]).any()


class TestRows:
    ROWS = (1, 4, 6)

    @staticmethod
    def tied(p: Any, ids: Any) -> Any:
        return jnp.tanh(p["table"][ids]) @ p["table"].T

    @pytest.fixture
    def table(self, normal: Any) -> Any:
        return {"table": normal(7, 4)}

    @pytest.fixture
    def adapter(self, table: Any, started: Any) -> jl.Adapter:
        ids = jnp.arange(3)
        return started(self.tied, table, ids, targets=jl.Rule("table", rows=self.ROWS))

    def test_only_they_change(self, table: Any, adapter: Any, stirred: Any) -> None:
        moved = stirred(adapter)
        merged = jl.merge(table, moved)["table"]
        others = [k for k in range(7) if k not in self.ROWS]
        old = np.asarray(table["table"])
        np.testing.assert_array_equal(np.asarray(merged)[others], old[others])
        np.testing.assert_allclose(
            np.asarray(merged)[list(self.ROWS)], moved["table"].value, atol=5e-7
        )
        np.testing.assert_array_equal(jl.merge(table, adapter)["table"], old)
        assert (moved["table"].rank, str(moved["table"])) == (3, "3 rows")
        assert adapter.trainable_params == 3 * 4
        # In lookups and in the head alike.
        ids = jnp.array([4, 0, 6, 4])
        got = jl.apply(self.tied, strict=True)(table, moved, ids)
        np.testing.assert_allclose(got, self.tied({"table": merged}, ids), rtol=0, atol=3e-6)

    def test_only_they_have_a_gradient_and_it_is_that_of_the_table(
        self, table: Any, adapter: Any, stirred: Any
    ) -> None:
        moved, ids = stirred(adapter), jnp.array([4, 0, 6, 4])

        def loss(p: Any) -> Any:
            return (self.tied(p, ids) ** 2).sum()

        adapted = jl.apply(self.tied, strict=True)
        got = jax.jit(jax.grad(lambda a: (adapted(table, a, ids) ** 2).sum()))(moved)["table"]
        want = np.asarray(jax.grad(loss)(jl.merge(table, moved))["table"], np.float64)
        size = np.abs(want).max()
        np.testing.assert_allclose(got.value, want[list(self.ROWS)], rtol=0, atol=1e-5 * size)
        assert got.rows == self.ROWS
        # A row that only the head uses has one too; without the head it has none.
        lookup = jl.apply(lambda p, ids: p["table"][ids], strict=True)
        alone = jax.grad(lambda a: (lookup(table, a, ids) ** 2).sum())(moved)["table"].value
        assert [bool(np.asarray(row).any()) for row in alone] == [False, True, True]

    def test_the_base_s_rows_have_none(self, table: Any, adapter: Any) -> None:
        """They are replaced, so the base's gradient is that of the other rows."""
        ids = jnp.array([4, 0, 6, 4])
        adapted = jl.apply(self.tied, strict=True)
        got = jax.grad(lambda p: (adapted(p, adapter, ids) ** 2).sum())(table)["table"]
        want = np.array(jax.grad(lambda p: (self.tied(p, ids) ** 2).sum())(table)["table"])
        want[list(self.ROWS)] = 0
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
        assert np.abs(want).max() > 0

    def test_it_trains_like_any_other_entry(self, table: Any, adapter: Any) -> None:
        ids = jnp.array([4, 0, 6, 4])
        adapted = jl.apply(self.tied)
        optimizer = jl.optim.lora_optimizer(optax.sgd(1e-3))

        def loss(a: Any) -> Any:
            return ((adapted(table, a, ids) - 1) ** 2).sum()

        first, grads = jax.value_and_grad(loss)(adapter)
        updates, _ = optimizer.update(grads, optimizer.init(adapter), adapter)
        assert float(loss(optax.apply_updates(adapter, updates))) < float(first)

    def test_of_a_stack_of_tables(self, normal: Any, started: Any, stirred: Any) -> None:
        params, ids = {"t": normal(2, 5, 3)}, jnp.array([[1, 0], [2, 4]])

        def fun(p: Any, ids: Any) -> Any:
            return jax.vmap(lambda table, i: table[i])(p["t"], ids)

        fresh = started(fun, params, ids, targets=jl.Rule("t", rows=(0, 4)))
        moved = stirred(fresh)
        merged = np.asarray(jl.merge(params, moved)["t"])
        assert moved["t"].value.shape == (2, 2, 3)
        np.testing.assert_array_equal(merged[:, 1:4], np.asarray(params["t"])[:, 1:4])
        np.testing.assert_allclose(merged[:, [0, 4]], moved["t"].value, rtol=0, atol=5e-7)
        np.testing.assert_allclose(
            jl.apply(fun, strict=True)(params, moved, ids),
            fun({"t": jnp.asarray(merged)}, ids),
            rtol=0,
            atol=1e-6,
        )

    def test_an_entry_made_by_hand_is_checked(self, table: Any, adapter: Any) -> None:
        beyond = dataclasses.replace(adapter["table"], rows=(1, 4, 7))
        with pytest.raises(jl.AdapterError, match=r"table: expected rows from 0 to 6, found \[7\]"):
            jl.merge(table, jl.Adapter({"table": beyond}))
        fewer = dataclasses.replace(adapter["table"], rows=(1, 4))
        with pytest.raises(jl.AdapterError, match=r"table: expected value of shapes \(\(2, 4\),\)"):
            jl.merge(table, jl.Adapter({"table": fewer}))
