"""Haiku: parameters are a dict of dicts whose keys contain ``/``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.adapter import leaves_by_path

hk = pytest.importorskip("haiku")
KEY = jax.random.key(0)


def test_mlp(normal: Any, check_model: Any, factored: Any) -> None:
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 5])(x)))
    x = normal(4, 6)
    params = model.init(KEY, x)
    # The module's name is one key, "mlp/~/linear_0"; in a path it reads like three.
    sites = factored("mlp/~/linear_0/w", "mlp/~/linear_1/w")
    check_model(model.apply, params, x, sites=sites)


def test_convolution_attention_and_embedding(normal: Any, check_model: Any, factored: Any) -> None:
    def forward(ids: Any) -> Any:
        x = hk.Embed(9, 4)(ids)
        x = hk.Conv1D(8, 3)(x)
        return hk.MultiHeadAttention(2, 4, w_init=hk.initializers.RandomNormal())(x, x, x)

    model = hk.without_apply_rng(hk.transform(forward))
    ids = np.array([[3, 0, 8, 2, 5], [7, 7, 1, 0, 4]], np.int32)
    params = model.init(KEY, ids)
    names = ("key", "linear", "query", "value")
    sites = factored(
        "conv1_d/w",
        "embed/embeddings",
        *(f"multi_head_attention/{name}/w" for name in names),
    )
    check_model(model.apply, params, ids, sites=sites)


def test_batch_statistics(normal: Any, check_model: Any, factored: Any) -> None:
    def forward(x: Any) -> Any:
        return hk.BatchNorm(True, True, 0.9)(hk.Linear(5)(x), is_training=True)

    model, x = hk.without_apply_rng(hk.transform_with_state(forward)), normal(4, 6)
    params, state = model.init(KEY, x)
    check_model(
        model.apply,
        params,
        state,
        x,
        sites=factored("linear/w"),
        pick=lambda out: out[0],
        tol=3e-5,
    )


def test_names_that_collide_are_refused() -> None:
    """``{"a/b": {"w"}}`` and ``{"a": {"b": {"w"}}}`` would be one path."""
    w = jnp.ones((3, 3))
    assert list(leaves_by_path({"a/b": {"w": w}, "a": {"w": w}})) == ["a/w", "a/b/w"]
    with pytest.raises(jl.AdapterError, match="two parameters have the path 'a/b/w'"):
        leaves_by_path({"a/b": {"w": w}, "a": {"b": {"w": w}}})
