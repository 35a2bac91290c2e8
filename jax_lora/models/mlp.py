"""The article's network: a multilayer perceptron on flattened images."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

Initializer = Callable[..., jax.Array]


def torch_default(fan_in: int) -> Initializer:
    """How torch's ``nn.Linear`` starts kernel and bias: uniform on ``±1/sqrt(fan_in)``."""
    bound = 1 / math.sqrt(fan_in)

    def initializer(key: jax.Array, shape: tuple[int, ...], dtype: Any = float) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return initializer


class MLP(nn.Module):
    """Dense layers ``l1, l2, ...`` with ReLU between them.

    Attributes:
        features: The width of each layer; the last one is the number of classes.
        initializer: From a layer's fan-in to the initializer of its kernel and bias.

    Example:
        >>> import jax.numpy as jnp
        >>> params = MLP((128, 128, 10)).init(jax.random.key(0), jnp.ones((1, 32, 32, 3)))
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        411146
    """

    features: tuple[int, ...]
    initializer: Callable[[int], Initializer] = torch_default

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits ``[batch, features[-1]]`` of inputs ``[batch, ...]``."""
        x = x.reshape(x.shape[0], -1)
        for index, width in enumerate(self.features, start=1):
            init = self.initializer(x.shape[-1])
            x = nn.Dense(width, kernel_init=init, bias_init=init, name=f"l{index}")(x)
            if index < len(self.features):
                x = nn.relu(x)
        return x
