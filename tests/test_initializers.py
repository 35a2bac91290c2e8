"""Each start is what its name stands for: a distribution, or a part of the weight."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.initializers import (
    FROM_WEIGHT,
    INITIALIZERS,
    article,
    gaussian,
    kaiming,
    olora,
    orthogonal,
    pissa,
)

RANK = 16
#: A fan-in unlike the rank, the fan-out, the stack and any product of them that could be mistaken.
STACK = jl.Layout((5, 20, 15, 40), (1, 2), (3,), (0,))


def _draw(initializer: Any, layout: jl.Layout = STACK, seed: int = 0) -> np.ndarray:
    return np.asarray(initializer(jax.random.key(seed), layout, RANK), np.float64)


@pytest.mark.parametrize(
    ("initializer", "bound"),
    [(kaiming, 1 / math.sqrt(20 * 15)), (article, 1 / math.sqrt(RANK))],
)
def test_uniform(initializer: Any, bound: float) -> None:
    a = _draw(initializer)
    assert a.shape == (5, 20, 15, RANK)
    n = a.size  # 24,000
    assert np.abs(a).max() <= bound * (1 + 1e-6)
    # The largest of n uniform numbers falls short of the bound by more than 20/n of it with
    # probability e^-20; mean and variance within 5 standard errors.
    assert a.max() > bound * (1 - 40 / n)
    assert a.min() < -bound * (1 - 40 / n)
    assert abs(a.mean()) < 5 * bound / math.sqrt(3 * n)
    assert a.var() == pytest.approx(bound**2 / 3, rel=5 * math.sqrt(0.8 / n))


def test_the_article_s_bound_is_that_of_torch_on_an_in_by_rank_tensor() -> None:
    layout = jl.Layout((3072, 128), (0,), (1,))
    a = np.asarray(article(jax.random.key(0), layout, 32))
    assert np.abs(a).max() == pytest.approx(0.1768, abs=1e-4)
    # Negative control: the library's default depends on the inputs and not on the rank.
    a = np.asarray(kaiming(jax.random.key(0), layout, 32))
    assert np.abs(a).max() == pytest.approx(1 / math.sqrt(3072), rel=1e-3)


def test_gaussian() -> None:
    a = _draw(gaussian)
    n = a.size
    assert abs(a.mean()) < 5 / RANK / math.sqrt(n)
    assert a.std() == pytest.approx(1 / RANK, rel=5 / math.sqrt(2 * n))
    # Normal and not uniform: kurtosis 3, not 1.8.
    assert ((a / a.std()) ** 4).mean() == pytest.approx(3, abs=5 * math.sqrt(96 / n))


@pytest.mark.parametrize("name", INITIALIZERS)
def test_a_key_fixes_it_and_layers_of_a_stack_differ(name: str) -> None:
    a = _draw(INITIALIZERS[name])
    np.testing.assert_array_equal(a, _draw(INITIALIZERS[name]))
    assert (a != _draw(INITIALIZERS[name], seed=1)).mean() > 0.99
    assert (a[0] != a[1]).mean() > 0.99


def test_every_configured_name_has_an_initializer(normal: Any) -> None:
    def model(params: Any, x: Any) -> Any:
        return x @ params["w"]

    params, x = {"w": normal(12, 10)}, normal(2, 12)
    first = {}
    for name in INITIALIZERS:
        plan = jl.plan(model, params, x, config=jl.LoraConfig(rank=4, init=name))
        first[name] = np.asarray(jl.init(jax.random.key(0), params, plan)["w"].a)
    assert np.abs(first["kaiming"]).max() <= 1 / math.sqrt(12)
    assert np.abs(first["article"]).max() > 1 / math.sqrt(12)
    assert np.abs(first["article"]).max() <= 0.5
    assert len({a.tobytes() for a in first.values()}) == len(INITIALIZERS) == 4


class TestOrthogonal:
    def test_columns_are_orthonormal_for_each_matrix_of_a_stack(self) -> None:
        a = _draw(orthogonal).reshape(5, 300, RANK)
        for one in a:
            np.testing.assert_allclose(one.T @ one, np.eye(RANK), rtol=0, atol=1e-5)
        # Negative control: no other start has such columns.
        other = _draw(kaiming).reshape(5, 300, RANK)
        assert np.abs(other[0].T @ other[0] - np.eye(RANK)).max() > 0.1

    def test_rows_are_orthonormal_where_the_rank_exceeds_the_inputs(self) -> None:
        a = _draw(orthogonal, jl.Layout((2, 7, 30), (1,), (2,), (0,)))
        assert a.shape == (2, 7, RANK)
        for one in a:
            np.testing.assert_allclose(one @ one.T, np.eye(7), rtol=0, atol=1e-5)

    def test_directions_are_uniform(self) -> None:
        """Of a random unit vector in n dimensions, every coordinate has the variance 1/n."""
        layout = jl.Layout((2000, 6, 3), (1,), (2,), (0,))
        a = np.asarray(orthogonal(jax.random.key(0), layout, 2), np.float64)
        n = 2000
        # The fourth moment of a coordinate is 3/(n (n + 2)): 5 standard errors.
        spread = math.sqrt((3 / 48 - 1 / 36) / n)
        np.testing.assert_allclose((a**2).mean(0), 1 / 6, rtol=0, atol=5 * spread)
        np.testing.assert_allclose(a.mean(0), 0, rtol=0, atol=5 * math.sqrt(1 / 6 / n))


class TestKeys:
    def params(self, *names: str) -> Any:
        return {name: jnp.ones((12, 10)) for name in names}

    def start(self, init: str, params: Any) -> dict[str, np.ndarray]:
        def model(params: Any, x: Any) -> Any:
            return [x @ w for w in params.values()]

        x = jnp.ones((2, 12))
        plan = jl.plan(model, params, x, config=jl.LoraConfig(rank=4, init=init))
        return {p: np.asarray(e.a) for p, e in jl.init(jax.random.key(0), params, plan).items()}

    @pytest.mark.parametrize("init", INITIALIZERS)
    def test_a_layer_more_changes_nothing(self, init: str) -> None:
        before = self.start(init, self.params("l1", "l3"))
        after = self.start(init, self.params("l0", "l1", "l2", "l3"))
        for path, a in before.items():
            np.testing.assert_array_equal(a, after[path])
        # Layers of the same shape differ: from one key for all they would be the same.
        assert len({a.tobytes() for a in after.values()}) == 4
        layout = jl.Layout((12, 10), (0,), (1,))
        shared = [INITIALIZERS[init](jax.random.key(0), layout, 4) for _ in "12"]
        np.testing.assert_array_equal(*shared)
        # And from keys split in order, another layer in front would change all.
        third, first = (jax.random.split(jax.random.key(0), n)[-1] for n in (4, 2))
        assert (INITIALIZERS[init](third, layout, 4) != INITIALIZERS[init](first, layout, 4)).any()


def _weights(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def _t(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, -1, -2)


#: A stack, wide and tall matrices, a rank above the smaller side.
SHAPES = [((9, 7), 3), ((5, 12), 3), ((2, 3, 6, 8), 4), ((4, 10), 6)]


class TestPissa:
    @pytest.mark.parametrize("scale", [1.0, 0.25, 16.0, -2.0])
    @pytest.mark.parametrize(("shape", "rank"), SHAPES)
    def test_is_numpy_s_best_approximation(
        self, shape: tuple[int, ...], rank: int, scale: float
    ) -> None:
        w = _weights(*shape)
        a, b = (np.asarray(x, np.float64) for x in pissa(w, rank, scale))
        u, s, vt = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
        best = (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]
        assert (a.shape, b.shape) == ((*shape[:-1], rank), (*shape[:-2], rank, shape[-1]))
        np.testing.assert_allclose(scale * a @ b, best, rtol=0, atol=5e-6 * s.max())
        # Both factors carry half: a^T a = b b^T = S/|s|.
        k = min(rank, s.shape[-1])
        half = np.zeros((*shape[:-2], rank, rank))
        half[..., range(k), range(k)] = s[..., :k] / abs(scale)
        for gram in (_t(a) @ a, b @ _t(b)):
            np.testing.assert_allclose(gram, half, rtol=0, atol=1e-5 * half.max())

    def test_of_no_scale(self) -> None:
        with pytest.raises(jl.ConfigError, match="a scale other than 0"):
            pissa(_weights(4, 4), 2, 0.0)

    def test_negative_control(self) -> None:
        """Other singular vectors are further from the weight."""
        w = np.asarray(_weights(9, 7), np.float64)
        a, b = (np.asarray(x, np.float64) for x in pissa(_weights(9, 7), 3, 1.0))
        u, s, vt = np.linalg.svd(w, full_matrices=False)
        other = (u[:, 1:4] * s[1:4]) @ vt[1:4]
        assert np.linalg.norm(w - a @ b) < 0.95 * np.linalg.norm(w - other)


class TestOlora:
    @pytest.mark.parametrize(("shape", "rank"), SHAPES)
    def test_is_numpy_s_qr(self, shape: tuple[int, ...], rank: int) -> None:
        w = _weights(*shape)
        a, b = (np.asarray(x, np.float64) for x in olora(w, rank, 0.3))
        q, r = np.linalg.qr(_t(np.asarray(w, np.float64)))
        k = min(rank, q.shape[-1])
        # A column of Q and its row of R are defined up to one sign for both.
        np.testing.assert_allclose(np.abs(a[..., :k]), np.abs(_t(r[..., :k, :])), rtol=0, atol=1e-5)
        np.testing.assert_allclose(np.abs(b[..., :k, :]), np.abs(_t(q[..., :k])), rtol=0, atol=1e-5)
        np.testing.assert_allclose(a @ b, _t(q[..., :k] @ r[..., :k, :]), rtol=0, atol=1e-5)
        assert not a[..., k:].any()
        assert not b[..., k:, :].any()

    def test_projects_onto_the_first_rows(self) -> None:
        w = np.asarray(_weights(9, 7), np.float64)
        a, b = (np.asarray(x, np.float64) for x in olora(_weights(9, 7), 3, 1.0))
        np.testing.assert_allclose((a @ b)[:3], w[:3], rtol=0, atol=1e-5)
        assert np.abs((a @ b)[3:] - w[3:]).max() > 0.1  # the other rows are not in their span


@pytest.mark.parametrize("init", FROM_WEIGHT)
class TestFromTheWeight:
    """In an adapter: anchored, the base untouched, whatever the layout and dtypes."""

    def start(self, init: str, dtype: str, factors: str) -> tuple[Any, ...]:
        # [out, heads, in] with a stack in the middle: the factors have to be of the right matrix.
        params = {"w": _weights(8, 2, 10).astype(dtype)}
        x = _weights(5, 2, 10).astype(dtype)

        def model(params: Any, x: Any) -> Any:
            return jnp.einsum("osi,nsi->nso", params["w"], x)

        config = jl.LoraConfig(rank=3, alpha=6.0, init=init, dtype=factors)
        plan = jl.plan(model, params, x, config=config)
        return model, params, x, jl.init(jax.random.key(0), params, plan)

    @pytest.mark.parametrize("factors", ["float32", "bfloat16"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_is_of_this_weight_and_changes_nothing(
        self, init: str, dtype: str, factors: str
    ) -> None:
        model, params, x, adapter = self.start(init, dtype, factors)
        entry = adapter["w"]
        assert entry.layout == jl.Layout((8, 2, 10), (2,), (0,), (1,))
        assert {str(v.dtype) for v in (entry.a, entry.b, entry.a0, entry.b0)} == {factors}
        np.testing.assert_array_equal(entry.a, entry.a0)
        np.testing.assert_array_equal(entry.b, entry.b0)
        for one, other in ((entry.a, entry.a0), (entry.b, entry.b0)):
            assert one.unsafe_buffer_pointer() != other.unsafe_buffer_pointer()
        run = jax.jit(jl.apply(model))(params, adapter, x)
        np.testing.assert_array_equal(run, jax.jit(model)(params, x))

        # [stack, in, out] by hand, and the product at the start of it.
        w = np.asarray(params["w"], np.float64).transpose(1, 2, 0)
        a, b = (np.asarray(v, np.float64) for v in (entry.a, entry.b))
        if init == "pissa":
            u, s, vt = np.linalg.svd(w, full_matrices=False)
            want = (u[..., :3] * s[..., None, :3]) @ vt[..., :3, :]
            got = 2.0 * a @ b
        else:
            q, r = np.linalg.qr(_t(w))
            want, got = _t(q[..., :3] @ r[..., :3, :]), a @ b
        tolerance = 1e-5 if factors == "float32" else 3 * 2**-8
        assert np.linalg.norm(got - want) < tolerance * np.linalg.norm(want)

    def test_both_factors_have_gradients_from_the_first_step(self, init: str) -> None:
        """With b = 0 that of a is zero; and none flows into the anchor."""
        model, params, x, adapter = self.start(init, "float32", "float32")

        def loss(adapter: jl.Adapter) -> Any:
            return (jl.apply(model)(params, adapter, x) ** 2).sum()

        grads = jax.grad(loss)(adapter)["w"]
        assert np.abs(grads.a).max() > 0.01
        assert np.abs(grads.b).max() > 0.01
        assert not np.asarray(grads.a0).any()
        assert not np.asarray(grads.b0).any()

    def test_the_key_plays_no_role(self, init: str) -> None:
        _, params, x, adapter = self.start(init, "float32", "float32")
        model = self.start(init, "float32", "float32")[0]
        config = jl.LoraConfig(rank=3, alpha=6.0, init=init)
        plan = jl.plan(model, params, x, config=config)
        other = jl.init(jax.random.key(1), params, plan)
        jax.tree.map(np.testing.assert_array_equal, adapter, other)


@pytest.mark.parametrize("init", [*INITIALIZERS.values(), *FROM_WEIGHT.values()])
def test_every_start_says_where_it_comes_from(init: Any) -> None:
    """A paper by its arXiv number, or the article; and the formula."""
    text = init.__doc__
    assert "arXiv:" in text or "article" in text
    assert "``" in text
