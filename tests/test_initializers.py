"""Each start of ``a`` has the distribution its name stands for."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.initializers import INITIALIZERS, article, gaussian, kaiming

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
    assert len({a.tobytes() for a in first.values()}) == 3
