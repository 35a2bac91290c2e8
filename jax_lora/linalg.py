"""Decompositions of stacks of matrices, one after another on CPUs.

JAX on a CPU decomposes the matrices of a stack in parallel, from within a thread of XLA's pool that
then waits for the others. Two stacks that are decomposed in one program wait for each other for
ever where the pool has two threads (seen with jaxlib 0.10.2 on two cores: two independent QR
decompositions of 4,000 matrices under one `jax.jit`). One matrix at a time leaves nothing to wait
for, and takes about as long: LAPACK is most of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def qr(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The reduced QR decomposition of each matrix, as `jax.numpy.linalg.qr` has it.

    Args:
        matrices: ``[*stack, m, n]``.

    Returns:
        ``Q: [*stack, m, k]`` and ``R: [*stack, k, n]``, k = min(m, n).
    """
    return _each(lambda x: tuple(jnp.linalg.qr(x)), matrices)


def svd(matrices: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The thin SVD of each matrix, as `jax.numpy.linalg.svd` has it.

    Args:
        matrices: ``[*stack, m, n]``.

    Returns:
        ``U: [*stack, m, k]``, ``S: [*stack, k]``, descending, and ``V^T: [*stack, k, n]``.
    """
    return _each(lambda x: tuple(jnp.linalg.svd(x, full_matrices=False)), matrices)


def singular_values(matrices: jax.Array) -> jax.Array:
    """``S: [*stack, k]`` of each matrix, descending."""
    return _each(lambda x: jnp.linalg.svd(x, compute_uv=False), matrices)


def eigh(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The eigenvalues, ascending, and eigenvectors of each symmetric matrix."""
    return _each(lambda x: tuple(jnp.linalg.eigh(x)), matrices)


def _each(decompose: Callable[[jax.Array], Any], matrices: jax.Array) -> Any:
    stack, core = matrices.shape[:-2], matrices.shape[-2:]
    if not stack:
        return decompose(matrices)

    def one_by_one(matrices: jax.Array) -> Any:
        out = jax.lax.map(decompose, matrices.reshape(-1, *core))
        return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), out)

    return jax.lax.platform_dependent(matrices, cpu=one_by_one, default=decompose)
