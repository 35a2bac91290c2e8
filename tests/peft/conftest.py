"""The small model, and an adapter for it as PEFT's tensors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from tests.peft.small import TOKENS, P, World, forward


@pytest.fixture(scope="session")
def world() -> World:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    params = {
        "table": normal(7, 4),
        "layers": {"w": normal(2, 4, 4), "b": normal(2, 4)},
        "conv": {"kernel": normal(2, 4, 6)},
        "head": {"kernel": normal(6, 3), "bias": normal(3)},
    }
    return World(params, jl.discover(forward, params, jnp.asarray(TOKENS)))


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    """An adapter of rank 2 of the head and of both layers of the stack."""
    rng = np.random.default_rng(1)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    found = {}
    for module, fan_in, fan_out in (("head", 6, 3), ("layers.0.fc", 4, 4), ("layers.1.fc", 4, 4)):
        found[f"{P}{module}.lora_A.weight"] = normal(2, fan_in)
        found[f"{P}{module}.lora_B.weight"] = normal(fan_out, 2)
    return found
