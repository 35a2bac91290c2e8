"""Low-rank approximation of updates: the linear algebra below `combine`, `extract` and `resize`.

Everything works on matrices ``[*stack, in, out]``: a weight with several in- and out-axes is
brought to that form by its `Layout`, and back.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.adapter import Adapter
from jax_lora.errors import ConfigError
from jax_lora.linalg import qr, svd
from jax_lora.virtual import wider

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Approximation(NamedTuple):
    """An adapter, and how far it is from what it stands for.

    Attributes:
        adapter: The adapter.
        errors: By path, the relative error ``|dW - dW'|_F / |dW|_F`` that truncating the exact
            update ``dW`` to the adapter's rank made, over the whole weight with all its stacked
            matrices; 0 where nothing was truncated. From the discarded singular values: the
            rounding of the arithmetic is not in it. A measurement: no gradient flows through it.
    """

    adapter: Adapter
    errors: dict[str, jax.Array]


def check_rank(rank: Any) -> None:
    """Refuse what is not a rank.

    Raises:
        ConfigError: Not an integer, or below 1.
    """
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1:
        raise ConfigError(f"expected a rank of at least 1, got rank={rank!r}")


def working_dtype(*dtypes: Any) -> Any:
    """The dtype to compute in: the widest, and at least float32."""
    return functools.reduce(wider, dtypes, jnp.dtype("float32"))


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a b`` for each matrix of the stack."""
    return _matmul(a, b)


def dense_factors(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``matrices`` as a product of rank min(in, out): itself and an identity."""
    *stack, fan_in, fan_out = matrices.shape
    identity = jnp.eye(min(fan_in, fan_out), dtype=matrices.dtype)
    identity = jnp.broadcast_to(identity, (*stack, *identity.shape))
    return (identity, matrices) if fan_in < fan_out else (matrices, identity)


def pad(a: jax.Array, b: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """Zero columns of ``a`` and zero rows of ``b`` up to ``rank``."""
    more, stack = rank - a.shape[-1], [(0, 0)] * (a.ndim - 2)
    a = jnp.pad(a, [*stack, (0, 0), (0, more)])
    return a, jnp.pad(b, [*stack, (0, more), (0, 0)])


def truncate(a: jax.Array, b: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""The best approximation of ``a b`` of a rank, for each matrix of the stack.

    ``a b = U S V^T`` becomes ``a' = U_k`` and ``b' = U_k^T a b = S_k V_k^T`` (Eckart and Young
    1936), from the QR decompositions of both factors and the SVD of their small core: ``a b`` is
    not formed. The columns of ``a'`` are orthonormal, which makes them as large as LoRA's own
    start, and ``b'`` carries the singular values, so that no square root of a vanishing one is
    ever differentiated.

    The derivative of ``a' b'`` is that of the truncated product. It exists where the last kept
    singular value is larger than the first discarded one; those within either group may coincide
    or vanish. Where the two are equal to rounding, the term that would be infinite is left out and
    the derivative is that of the projection ``U_k U_k^T a b`` with that ``U_k`` held: finite, and
    right for every direction that keeps the product's column space. Of ``a'`` and ``b'`` alone the
    derivative is in the gauge ``U_k^T dU_k = 0``; second derivatives go through JAX's own rules
    for the SVD and need distinct, non-zero singular values.

    Args:
        a: ``[*stack, in, r]``, float32 or wider.
        b: ``[*stack, r, out]``.
        rank: The rank of the result, padded with zeros if above min(in, out).

    Returns:
        ``a': [*stack, in, rank]``, ``b': [*stack, rank, out]``, and the relative Frobenius error
        over the whole stack, a scalar.
    """
    u, y, s = _truncated(a, b, rank)
    return (*pad(u, y, rank), jax.lax.stop_gradient(_relative_tail(s, rank)))


def _relative_tail(s: jax.Array, rank: int) -> jax.Array:
    """The share of the norm of ``s: [*stack, m]`` beyond the first ``rank``."""
    top = s.max()
    s = s / jnp.where(top > 0, top, jnp.ones_like(top))  # squares of tiny numbers would underflow
    total, tail = jnp.sqrt((s**2).sum()), jnp.sqrt((s[..., rank:] ** 2).sum())
    return jnp.where(top > 0, tail / jnp.where(top > 0, total, jnp.ones_like(total)), tail)


def _svd_of_product(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``U: [*stack, in, m]``, ``S: [*stack, m]``, ``V: [*stack, out, m]`` of ``a b``."""
    q_a, r_a = qr(a)
    q_b, r_b = qr(b.mT)
    u, s, vt = svd(_matmul(r_a, r_b.mT))
    return _matmul(q_a, u), s, _matmul(q_b, vt.mT)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _truncated(a: jax.Array, b: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    u, s, _ = _svd_of_product(a, b)
    u = u[..., :rank]
    return u, _matmul(_matmul(u.mT, a), b), s


@_truncated.defjvp
def _truncated_jvp(rank: int, primals: Any, tangents: Any) -> Any:
    (a, b), (da, db) = primals, tangents
    u, s, v = _svd_of_product(a, b)
    kept, rest = u[..., :rank], u[..., rank:]
    y = _matmul(_matmul(kept.mT, a), b)

    # With X = a b and H = dX: H V_k and H^T U_k, without forming H.
    v_kept = v[..., :rank]
    h_v = _matmul(da, _matmul(b, v_kept)) + _matmul(a, _matmul(db, v_kept))
    h_u = _matmul(b.mT, _matmul(da.mT, kept)) + _matmul(db.mT, _matmul(a.mT, kept))

    # dU_k = U_j (s_i u_j^T H v_i + s_j v_j^T H^T u_i) / (s_i^2 - s_j^2) for the discarded j, and
    # H v_i / s_i outside of all of U. Rotations among the kept ones change no product.
    s_kept, s_rest = s[..., None, :rank], s[..., rank:, None]
    smallest = jnp.finfo(s.dtype).eps * max(a.shape[-2], b.shape[-1]) * s[..., :1, None]
    apart, nonzero = s_kept - s_rest > smallest, s_kept > smallest
    gap = jnp.where(apart, s_kept - s_rest, jnp.ones_like(s_rest))
    both = jnp.where(apart, s_kept + s_rest, jnp.ones_like(s_rest))
    turn = s_kept / both * _matmul(rest.mT, h_v) + s_rest / both * _matmul(v[..., rank:].mT, h_u)
    turn = jnp.where(apart, turn / gap, jnp.zeros_like(turn))
    outside = h_v - _matmul(u, _matmul(u.mT, h_v))
    outside = outside * jnp.where(nonzero, 1 / jnp.where(nonzero, s_kept, jnp.ones_like(s_kept)), 0)
    du = _matmul(rest, turn) + outside
    dy = _matmul(_matmul(du.mT, a) + _matmul(kept.mT, da), b) + _matmul(_matmul(kept.mT, a), db)
    return (kept, y, s), (du, dy, jnp.zeros_like(s))
