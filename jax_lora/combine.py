"""`combine`: one adapter from several, by the methods of the field, each defined on the updates."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.adapter import (
    Adapter,
    Entry,
    check_fits,
    check_plain,
    leaves_by_path,
    param_key,
    real_array,
)
from jax_lora.errors import AdapterError, ConfigError, near_misses
from jax_lora.lowrank import (
    Approximation,
    check_rank,
    dense_factors,
    product,
    truncate,
    working_dtype,
)
from jax_lora.variants import FullValue, factor_matrices, from_matrices
from jax_lora.virtual import wider

Method = Literal["cat", "linear", "svd", "magnitude_prune", "ties", "dare", "dare_ties"]

#: Exact ones, whose rank follows from the adapters.
_EXACT = ("cat", "linear")
#: Those that thin the updates out, by magnitude or at random, and those that elect a sign.
_TRIM, _DROP, _ELECT = ("magnitude_prune", "ties"), ("dare", "dare_ties"), ("ties", "dare_ties")


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float | jax.Array] | jax.Array | None = None,
    method: Method = "cat",
    *,
    rank: int | None = None,
    density: float | None = None,
    key: jax.Array | None = None,
    params: Any = None,
) -> Approximation:
    r"""One adapter from several: a weighted sum of their updates, or what a method makes of it.

    Every method is defined on the updates ``dW_i = s_i a_i b_i`` of a weight, so that it does not
    matter which of the many factorisations or which variant an adapter happens to hold, and a
    weight acts on its adapter like `scale`. The result is LoRA, of full rank where it is that of
    DoRA, and values trained whole stay such
    values; rows of them become LoRA. An adapter without an entry for a path counts
    as zero there. Ranks may differ. With ``w_i`` the weights:

    - ``"cat"``: ``sum_i w_i dW_i``, exactly: ``a = [a_1 ...]``, ``b = [w_1 s_1 b_1; ...]``. Ranks
      add. An adapter of weight 0 is in the state LoRA starts in: ``a`` as it was, ``b`` zero.
    - ``"linear"``: the same sum, exactly, with a rank of at most min(in, out): where the ranks add
      up to more, one factor is the sum itself and the other an identity. What the field calls
      linear adds ``sqrt(w_i s_i) a_i`` and ``sqrt(w_i s_i) b_i`` apart; their product has the
      cross terms ``a_i b_j``, so it is not linear in the updates, changes when a column of an
      ``a_i`` and row of its ``b_i`` change sign together, and has no negative weights. It is left
      out.
    - ``"svd"``: the best approximation of the sum of rank ``rank``, from the factors alone.
    - ``"magnitude_prune"``: ``sum_i w_i trim(dW_i)``, where ``trim`` keeps the share ``density`` of
      each matrix, the largest by magnitude (those equal to the smallest kept one included).
    - ``"ties"`` (Yadav et al. 2023): trim, elect the sign of ``sum_i w_i trim(dW_i)`` for each
      element, and average the ``w_i trim(dW_i)`` of that sign; 0 where the sum is.
    - ``"dare"`` (Yu et al. 2023): ``sum_i w_i drop(dW_i)``, where ``drop`` keeps each element with
      probability ``density`` and divides it by that, so that the expectation is the sum.
    - ``"dare_ties"``: as ``"ties"``, with ``drop`` in place of ``trim``.

    PEFT's ``add_weighted_adapter`` has the same updates under the names ``cat``, ``svd``,
    ``magnitude_prune_svd`` and, for equal weights, ``ties_svd``, which elects the sign before the
    weights; ``dare_linear_svd`` and ``dare_ties_svd`` draw from torch. Its combinations without
    ``svd`` prune and add the ``a_i`` and ``b_i`` apart, which is left out like its ``linear``.

    The last four form each ``dW_i``, and truncate the result to ``rank``. TIES trims the whole task
    vector at once; here each matrix is trimmed on its own, one of a stack as one that is alone, so
    that what becomes of a weight depends on no other. Like there, the mean does not grow with the
    number of adapters: `scale` the result.

    It works under `jax.jit` (``method``, ``rank`` and ``density`` static) and is differentiable in
    ``weights`` and adapters, so that weights can be trained: exactly for ``"cat"`` and
    ``"linear"``; for the truncating ones where the last kept and the first discarded singular value
    differ, and finite everywhere (see `jax_lora.lowrank.truncate`); the choices of TIES, DARE and
    pruning have derivative zero. Differentiate what depends on the product of a truncated result's
    factors, as every model does, not ``a`` or ``b`` alone.

    Args:
        adapters: At least one adapter, all with the same layouts where they share a path.
        weights: One number or scalar array for each adapter, or an array of shape ``[n]``; any
            sign. 1 for all by default.
        method: One of the above.
        rank: The rank of the result, for all but ``"cat"`` and ``"linear"``; by default the
            largest among the adapters, path by path. Above min(in, out) it is padded with zeros.
        density: The share of elements kept, in (0, 1]; required by all that keep a share.
        key: A JAX PRNG key, required by ``"dare"`` and ``"dare_ties"``. The elements dropped depend
            on it, on the path and on the adapter's place in the list.
        params: The base parameters, needed where an update depends on them (DoRA, trained values).

    Returns:
        The adapter, with ``scale`` 1 and the widest dtype of the factors, and the relative error
        of truncation for each path. In the truncated ones the columns of ``a`` are orthonormal.

    Raises:
        ConfigError: No adapters, weights of another number, an unknown method, a rank below 1, a
            density outside (0, 1], a missing argument, or one that the method does not use.
        AdapterError: Adapters whose layouts of the same path differ, all of them at once.

    Example:
        >>> import jax.numpy as jnp, jax_lora as jl
        >>> layout = jl.Layout((2, 3), in_axes=(0,), out_axes=(1,))
        >>> factors = jl.LoraFactors(jnp.ones((2, 1)), jnp.ones((1, 3)), jnp.float32(2), layout)
        >>> adapter = jl.Adapter({"w": factors})
        >>> both, errors = combine([adapter, adapter], weights=[1.0, -0.25])
        >>> both["w"].rank, jl.delta(both)["w"].tolist(), float(errors["w"])
        (2, [[1.5, 1.5, 1.5], [1.5, 1.5, 1.5]], 0.0)
        >>> one, errors = combine([adapter, adapter], [1.0, -0.25], "svd", rank=1)
        >>> one["w"].rank, float(errors["w"]) < 1e-6
        (1, True)

    References:
        Yadav et al. 2023, TIES-Merging: Resolving Interference When Merging Models,
        arXiv:2306.01708. Yu et al. 2023, Language Models are Super Mario: Absorbing Abilities from
        Homologous Models as a Free Lunch, arXiv:2311.03099. Ilharco et al. 2022, Editing Models
        with Task Arithmetic, arXiv:2212.04089.
    """
    _check_arguments(adapters, method, rank, density, key)
    values = _check_weights(weights, len(adapters))
    for adapter in adapters:
        check_plain(adapter)
    _check_layouts(adapters)
    if params is not None:
        for adapter in adapters:
            check_fits(params, adapter)
    leaves = {} if params is None else leaves_by_path(params)
    entries: dict[str, Entry] = {}
    errors: dict[str, jax.Array] = {}
    for path in sorted({path for adapter in adapters for path in adapter}):
        held = [(i, adapter[path]) for i, adapter in enumerate(adapters) if path in adapter]
        arrays = [x for _, f in held for x in f.trained().values()]
        dtype = functools.reduce(wider, [x.dtype for x in arrays])
        work = working_dtype(dtype)
        parts = []
        for i, f in held:
            a, b = (m.astype(work) for m in factor_matrices(path, f, leaves.get(path)))
            parts.append(_Part(i, values[i].astype(work), a, b))
        if method in (*_EXACT, "svd"):
            a, b = _exact_sum(parts)
            if method == "linear" and a.shape[-1] > min(a.shape[-2], b.shape[-1]):
                a, b = dense_factors(product(a, b))
        else:
            a, b = dense_factors(_merged(path, parts, method, density, key))
        errors[path] = jnp.zeros((), work)
        first = held[0][1]
        if isinstance(first, FullValue):
            new = leaves[path].astype(work) + product(a, b).reshape(first.shape)
            entries[path] = FullValue(new.astype(dtype), first.shape)
            continue
        if method not in _EXACT:
            a, b, errors[path] = truncate(a, b, rank or max(f.rank for _, f in held))
        entries[path] = from_matrices(a.astype(dtype), b.astype(dtype), first.layout)
    return Approximation(Adapter(entries), errors)


class _Part(NamedTuple):
    """One adapter's update ``a b`` of one weight, its scale in ``b``, and its place in the list."""

    place: int
    weight: jax.Array
    a: jax.Array
    b: jax.Array


def _exact_sum(parts: Sequence[_Part]) -> tuple[jax.Array, jax.Array]:
    """``sum_i w_i a_i b_i`` as one product: the ranks side by side."""
    a = jnp.concatenate([part.a for part in parts], axis=-1)
    return a, jnp.concatenate([part.weight * part.b for part in parts], axis=-2)


def _merged(path: str, parts: Sequence[_Part], method: Method, density: Any, key: Any) -> jax.Array:
    """The dense ``[*stack, in, out]`` of the methods that thin the updates out."""

    def thinned(part: _Part) -> jax.Array:
        update = product(part.a, part.b)
        if method in _TRIM:
            return _trim(update, density)
        return _drop(jax.random.fold_in(param_key(key, path), part.place), update, density)

    weighted = jnp.stack([part.weight * thinned(part) for part in parts])
    return _elected_mean(weighted) if method in _ELECT else weighted.sum(0)


def _trim(update: jax.Array, density: Any) -> jax.Array:
    """The largest elements by magnitude of each matrix ``[*stack, in, out]``, and 0 elsewhere."""
    # A threshold, not the first so many: equal elements share one fate, however the axes lie.
    size = jnp.abs(update).reshape(*update.shape[:-2], -1)
    kept = max(1, round(density * size.shape[-1]))
    threshold = jax.lax.top_k(size, kept)[0][..., -1:, None]
    return jnp.where(jnp.abs(update) >= threshold, update, jnp.zeros_like(update))


def _drop(key: jax.Array, update: jax.Array, density: Any) -> jax.Array:
    """Each element with probability ``density``, divided by that, and 0 elsewhere."""
    kept = jax.random.bernoulli(key, float(density), update.shape)
    return jnp.where(kept, update / density, jnp.zeros_like(update))


def _elected_mean(updates: jax.Array) -> jax.Array:
    """The mean of those of ``updates: [n, ...]`` that have the sign of their sum."""
    sign = jnp.sign(updates.sum(0))
    agree = jnp.sign(updates) == sign  # where that is 0, zeros alone
    count = agree.sum(0).astype(updates.dtype)
    total = jnp.where(agree, updates, jnp.zeros_like(updates)).sum(0)
    return total / jnp.maximum(count, jnp.ones_like(count))


def _check_arguments(adapters: Any, method: Any, rank: Any, density: Any, key: Any) -> None:
    if not isinstance(adapters, (list, tuple)) or not adapters:
        got = "none" if isinstance(adapters, (list, tuple)) else f"a {type(adapters).__name__}"
        raise ConfigError(f"expected a list of at least one adapter, got {got}")
    for i, adapter in enumerate(adapters):
        if not isinstance(adapter, Adapter):
            raise ConfigError(f"expected adapters, got a {type(adapter).__name__} at place {i}")
    if method not in get_args(Method):
        raise ConfigError(
            f"expected method to be one of {', '.join(get_args(Method))}; got {method!r} "
            f"({near_misses(str(method), get_args(Method))})"
        )
    if rank is not None:
        check_rank(rank)
        if method in _EXACT:
            raise ConfigError(
                f"expected no rank for {method!r}, which is exact, got rank={rank}; use 'svd'"
            )
    takes_density, takes_key = method in (*_TRIM, *_DROP), method in _DROP
    for name, value, taken in (("density", density, takes_density), ("key", key, takes_key)):
        if taken and value is None:
            raise ConfigError(f"expected a {name} for {method!r}, got none; pass {name}=...")
        if not taken and value is not None:
            raise ConfigError(
                f"expected no {name} for {method!r}, which does not use it; leave it out"
            )
    if takes_density:
        number = isinstance(density, numbers.Real) and not isinstance(density, bool)
        if not number or not 0 < density <= 1:
            raise ConfigError(
                f"expected a density in (0, 1], the share of elements to keep; got {density!r}"
            )


def _check_weights(weights: Any, count: int) -> list[jax.Array]:
    """One scalar array for each adapter."""
    if weights is None:
        weights = [1.0] * count
    shape = tuple(weights.shape) if hasattr(weights, "shape") else None
    listed = isinstance(weights, (list, tuple))
    if shape is None and listed and all(np.shape(w) == () for w in weights):
        shape = (len(weights),)
    if shape != (count,):
        got = f"shape {shape}" if shape is not None else repr(weights)
        raise ConfigError(
            f"expected one weight for each of the {count} adapters, an array of shape ({count},) "
            f"or a list of scalars; got {got}"
        )
    return [real_array(f"weight {i}", weights[i]) for i in range(count)]


def _check_layouts(adapters: Sequence[Adapter]) -> None:
    first: dict[str, tuple[int, Any]] = {}
    problems = []
    for i, adapter in enumerate(adapters):
        for path, entry in adapter.items():
            kind = "a value trained whole" if isinstance(entry, FullValue) else entry.layout
            j, expected = first.setdefault(path, (i, kind))
            if kind != expected:
                problems.append(f"{path}: expected {expected} as in adapter {j}, got {kind} in {i}")
    if problems:
        raise AdapterError(
            "expected adapters of the same weights; use ones that were planned for the same model, "
            "or `drop` the paths that differ:\n  " + "\n  ".join(problems)
        )
