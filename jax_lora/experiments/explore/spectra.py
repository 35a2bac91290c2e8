"""Singular values of updates, and how far the directions of two updates are the same."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

import jax_lora as jl
from jax_lora.experiments.explore.accuracy import Outcomes
from jax_lora.experiments.explore.study import KERNELS, Study

#: Shares of the squared singular values.
ENERGIES = (0.5, 0.9, 0.99)
#: How many directions are compared; as many as the LoRA paper's section 7 has.
_FEW, _MANY = 8, 64


def measure(study: Study, outcomes: Outcomes) -> dict[str, Any]:
    """Spectra, distances from full fine-tuning, its truncation, and overlaps."""
    options, seed = study.options, study.options.seed
    kernels = sorted(study.plan(study.config(targets=KERNELS)).targets)
    full = {s: updates(study, outcomes["full", None, s].adapter) for s in options.seeds}
    lora = {
        (rank, s): updates(study, outcomes["rank", rank, s].adapter)
        for rank in options.ranks
        for s in options.seeds
    }
    spectra = {
        path: {
            "min_dim": min(full[seed][path].shape),
            "full": _values(full[seed][path]),
            "gaussian": _values(_gaussian(full[seed][path])),
            "lora": {str(rank): _values(lora[rank, seed][path], rank) for rank in options.ranks},
        }
        for path in kernels
    }
    distances = [
        {
            "rank": rank,
            "distance": [
                _distance({path: lora[rank, s][path] for path in kernels}, full[s])
                for s in options.seeds
            ],
        }
        for rank in options.ranks
    ]
    return {
        "spectra": spectra,
        "distances": distances,
        "truncated": _truncated(study, outcomes["full", None, seed].adapter),
        "overlaps": _overlaps(study, outcomes, full, lora, kernels),
    }


def updates(study: Study, adapter: jl.Adapter) -> dict[str, np.ndarray]:
    """``dW`` of every adapted parameter, ``[in, out]`` for kernels."""
    return {path: np.asarray(dw) for path, dw in jl.delta(adapter, study.params).items()}


def rank_of_energy(values: Any, share: float) -> int:
    """How many of the largest singular values hold a share of the sum of their squares.

    Example:
        >>> rank_of_energy([3.0, 1.0, 1.0], 0.8), rank_of_energy([3.0, 1.0, 1.0], 0.9)
        (1, 2)
    """
    squares = np.cumsum(np.square(np.asarray(values, np.float64)))
    return int(np.searchsorted(squares, share * squares[-1] * (1 - 1e-12)) + 1)


def overlap(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """How far the first ``i`` columns of one basis lie in the span of the first ``j`` of another.

    ``phi(i, j) = |U_i^T V_j|_F^2 / min(i, j)``, from 0, orthogonal, to 1, one within the other.

    Args:
        left: ``[d, m]`` with orthonormal columns.
        right: ``[d, n]`` with orthonormal columns.

    Returns:
        ``[m, n]``; ``phi(i, j)`` is at ``[i - 1, j - 1]``.

    Example:
        >>> overlap(np.eye(4)[:, :2], np.eye(4)[:, 1:3]).tolist()
        [[0.0, 0.0], [1.0, 0.5]]

    References:
        Hu et al. 2021, arXiv:2106.09685, section 7.2.
    """
    squares = np.square(left.T @ right).cumsum(0).cumsum(1)
    i, j = np.indices(squares.shape) + 1
    return np.asarray(squares / np.minimum(i, j))


def _values(matrix: np.ndarray, rank: int | None = None) -> list[float]:
    """The singular values from the largest; of a matrix of a known rank as many as that."""
    values = np.linalg.svd(matrix, compute_uv=False)[:rank]
    return [float(f"{value:.4g}") for value in values]


def _gaussian(matrix: np.ndarray) -> np.ndarray:
    """What has no structure: independent normal numbers in the same shape."""
    return np.random.default_rng(0).normal(size=matrix.shape)


def _distance(lora: dict[str, np.ndarray], full: dict[str, np.ndarray]) -> float:
    """``|dW_lora - dW_full| / |dW_full|`` over all kernels together."""
    apart = sum(float(np.square(dw - full[path]).sum()) for path, dw in lora.items())
    size = sum(float(np.square(full[path]).sum()) for path in lora)
    return float(np.sqrt(apart / size))


def _truncated(study: Study, full: jl.Adapter) -> list[dict[str, Any]]:
    """The accuracy of full fine-tuning with each kernel's update cut to a rank."""
    test = study.tester(study.own_task)
    tuned = jl.merge(study.params, full)
    layouts = study.plan(study.config(targets=KERNELS)).targets
    ranks = sorted({r for r in study.options.ranks if r < max(study.options.ranks)})
    rows = []
    for rank in ranks:
        adapter, _ = jl.extract(study.params, tuned, layouts, rank=rank, ignore="**/bias")
        cut = jl.merge(study.params, adapter)
        # The biases are those of full fine-tuning.
        params = jax.tree.map(lambda c, t: c if c.ndim == 2 else t, cut, tuned)
        rows.append({"rank": rank, "accuracy": test(jl.Adapter({}), params)})
    return [*rows, {"rank": None, "accuracy": test(jl.Adapter({}), tuned)}]


def _overlaps(
    study: Study, outcomes: Outcomes, full: Any, lora: Any, kernels: list[str]
) -> dict[str, Any]:
    """For each kernel the overlaps of input directions between ranks, seeds, and methods."""
    seed, ranks = study.options.seed, study.options.ranks
    few = max((rank for rank in ranks if rank <= _FEW), default=min(ranks))
    many = max((rank for rank in ranks if rank <= _MANY), default=max(ranks))
    other = study.options.seeds[-1]

    def factor(rank: int, path: str) -> np.ndarray:
        return np.asarray(outcomes["rank", rank, seed].adapter[path].a)

    def pairs(path: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        small, large = (_directions(lora[rank, seed][path], rank) for rank in (few, many))
        a_few, a_many = (_directions(factor(rank, path), rank) for rank in (few, many))
        return {
            f"A: rank {few} and {many}": (a_few, a_many),
            f"AB: rank {few} and {many}": (small, large),
            f"AB: rank {many}, two seeds": (large, _directions(lora[many, other][path], many)),
            f"AB of rank {many}, and full": (large, _directions(full[seed][path], many)),
        }

    def phi(left: np.ndarray, right: np.ndarray) -> list[list[float]]:
        return [[float(f"{value:.4f}") for value in row] for row in overlap(left, right)]

    return {
        "few": few,
        "many": many,
        "inputs": {path: study.plan(study.config()).targets[path].shape[0] for path in kernels},
        "phi": {path: {n: phi(*pair) for n, pair in pairs(path).items()} for path in kernels},
    }


def _directions(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The input directions of the largest singular values, ``[in, at most rank]``."""
    return np.linalg.svd(matrix, full_matrices=False)[0][:, :rank]
