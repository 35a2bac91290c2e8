"""How the factor ``a`` starts; ``b`` starts at zero, so that a fresh adapter changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_lora.adapter import Layout

Initializer = Callable[[jax.Array, Layout, int], jax.Array]


def kaiming(key: jax.Array, layout: Layout, rank: int) -> jax.Array:
    """Uniform on ``±1/sqrt(fan_in)``: what loralib and PEFT start ``A`` with.

    References:
        He et al. 2015, arXiv:1502.01852, with gain ``sqrt(1/3)``; Hu et al. 2021,
        arXiv:2106.09685, whose code uses it.
    """
    return _uniform(key, layout.a_shape(rank), 1 / math.sqrt(layout.fan_in))


def gaussian(key: jax.Array, layout: Layout, rank: int) -> jax.Array:
    """Normal with mean 0 and standard deviation ``1/r``: the paper's Gaussian, with PEFT's width.

    References:
        Hu et al. 2021, arXiv:2106.09685, section 4.1 (which leaves the width open).
    """
    return jax.random.normal(key, layout.a_shape(rank), jnp.float32) / rank


def article(key: jax.Array, layout: Layout, rank: int) -> jax.Array:
    """Uniform on ``±1/sqrt(r)``, as the CIFAR-10 article's program has it.

    torch's ``kaiming_uniform_(a=sqrt(5))`` takes the fan-in from dimension 1. The article stores
    ``A`` as ``[in, r]``, so its fan-in is the rank and not the number of inputs.
    """
    return _uniform(key, layout.a_shape(rank), 1 / math.sqrt(rank))


def _uniform(key: jax.Array, shape: tuple[int, ...], bound: float) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


INITIALIZERS: dict[str, Initializer] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "article": article,
}
