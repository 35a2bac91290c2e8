"""How the factors start, from a key or from the weight itself.

From a key: ``a`` is random and ``b`` zero, so that a fresh adapter changes nothing. From the
weight: both are parts of it, and their product at the start is subtracted (see `LoraFactors`). From
data: see `jax_lora.from_data`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_lora.adapter import Layout
from jax_lora.errors import ConfigError
from jax_lora.linalg import qr, svd
from jax_lora.lowrank import pad, working_dtype

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


def orthogonal(key: jax.Array, layout: Layout, rank: int) -> jax.Array:
    """Random orthonormal columns, ``a^T a = 1``; orthonormal rows if the rank exceeds the inputs.

    References:
        Saxe et al. 2013, Exact solutions to the nonlinear dynamics of learning in deep linear
        neural networks, arXiv:1312.6120.
    """
    draw = jax.nn.initializers.orthogonal()
    keys = jax.random.split(key, math.prod(layout.stack))
    matrices = jax.lax.map(lambda k: draw(k, (layout.fan_in, rank), jnp.float32), keys)
    return matrices.reshape(layout.a_shape(rank))


def pissa(w: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    r"""The principal singular values and vectors: ``a = U_r (S_r/s)^1/2, b = (S_r/s)^1/2 V_r^T``.

    Args:
        w: ``[*stack, in, out]``.
        rank: The rank r; what exceeds min(in, out) is zero.
        scale: What multiplies ``a b``, the s above, not zero. If it is negative, ``b`` is too.

    Returns:
        ``a: [*stack, in, r]`` and ``b: [*stack, r, out]`` with ``s a b`` the best approximation of
        ``w`` of that rank.

    Raises:
        ConfigError: A scale of zero.

    References:
        Meng et al. 2024, PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
        Language Models, arXiv:2404.02948.
    """
    if scale == 0:
        raise ConfigError("expected a scale other than 0 for the init 'pissa', got alpha=0")
    u, s, vt = svd(w.astype(working_dtype(w.dtype)))
    root = jnp.sqrt(s[..., :rank] / abs(scale))
    b = math.copysign(1, scale) * root[..., :, None] * vt[..., :rank, :]
    return pad(u[..., :rank] * root[..., None, :], b, rank)


def olora(w: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    r"""The first rows and columns of ``w^T = Q R``: ``a = (R_r)^T`` and ``b = (Q_r)^T``.

    So ``a b = w b^T b`` is ``w`` projected onto the span of its first r rows.

    Args:
        w: ``[*stack, in, out]``.
        rank: The rank r; what exceeds min(in, out) is zero.
        scale: Not used: as in PEFT the product at the start, whatever its scale, is subtracted.

    Returns:
        ``a: [*stack, in, r]`` and ``b: [*stack, r, out]``, the rows of ``b`` orthonormal.

    References:
        Büyükakyüz 2024, OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models,
        arXiv:2406.01775.
    """
    q, r = qr(w.mT.astype(working_dtype(w.dtype)))
    return pad(r[..., :rank, :].mT, q[..., :rank].mT, rank)


def _uniform(key: jax.Array, shape: tuple[int, ...], bound: float) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


INITIALIZERS: dict[str, Initializer] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "article": article,
    "orthogonal": orthogonal,
}

#: Of the weight's matrices, the rank and the scale: both factors.
FromWeight = Callable[[jax.Array, int, float], tuple[jax.Array, jax.Array]]
FROM_WEIGHT: dict[str, FromWeight] = {"pissa": pissa, "olora": olora}
