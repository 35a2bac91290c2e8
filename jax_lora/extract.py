"""Adapters of another rank: `extract` from two checkpoints, `resize` of an adapter."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.adapter import Adapter, Entry, Layout, check_plain, leaves_by_path
from jax_lora.errors import AdapterError, ConfigError, expect_type, near_misses
from jax_lora.linalg import singular_values
from jax_lora.lowrank import (
    Approximation,
    check_rank,
    dense_factors,
    pad,
    truncate,
    working_dtype,
)
from jax_lora.rules import matching_paths
from jax_lora.variants import (
    DoraFactors,
    FullValue,
    LoraFactors,
    factor_matrices,
    from_matrices,
)


class HasLayout(Protocol):
    """What knows the layout of a weight: an entry of an adapter, a target of a plan."""

    @property
    def layout(self) -> Layout | None:
        """The roles of the weight's axes."""
        ...


def extract(
    base: Any,
    tuned: Any,
    layouts: Mapping[str, Layout | HasLayout],
    *,
    rank: int | None = None,
    energy: float | None = None,
    ignore: str | Sequence[str] = (),
) -> Approximation:
    r"""The adapter nearest to what full training changed: ``a b ~ W_tuned - W_base``.

    For each matrix of each weight the best approximation of a rank in the Frobenius norm, from the
    SVD of the difference. ``energy`` chooses, for each weight, the smallest rank that keeps this
    share of the squared singular values of all its stacked matrices together, so that its relative
    error is at most ``sqrt(1 - energy)``. Two checkpoints differ by their rounding too, which has
    full rank: an ``energy`` of 1 keeps that as well.

    Args:
        base: The parameters before.
        tuned: The parameters after, of the same tree and shapes; dtypes may differ.
        layouts: The weights to extract, with the roles of their axes: ``plan.targets``, an adapter,
            or `Layout` by path. What is trained whole there is so in the result.
        rank: The rank for every weight; above min(in, out) it is padded with zeros.
        energy: Instead of ``rank``, the share to keep, in (0, 1].
        ignore: Globs of parameters outside ``layouts`` that may differ; they are not compared.

    Returns:
        The adapter, with ``scale`` 1, orthonormal columns of ``a``, and the wider of the weights'
        dtypes, at least float32; and the relative error for each path.

    Raises:
        ConfigError: Not exactly one of ``rank`` and ``energy``, one that is out of range; or values
            are needed that are not known under `jax.jit`: for ``energy``, and to compare what is
            neither in ``layouts`` nor ignored (``ignore="**"`` compares nothing).
        AdapterError: The trees do not fit each other or ``layouts``, or a parameter differs that is
            neither in ``layouts`` nor ignored; all of them at once.
        TargetError: A glob of ``ignore`` that matches no parameter.

    Example:
        >>> import jax.numpy as jnp, jax_lora as jl
        >>> layout = jl.Layout((2, 3), in_axes=(0,), out_axes=(1,))
        >>> base, tuned = {"w": jnp.zeros((2, 3))}, {"w": jnp.ones((2, 3))}
        >>> adapter, errors = extract(base, tuned, {"w": layout}, energy=0.99)
        >>> adapter["w"].rank, float(errors["w"]) < 1e-6
        (1, True)
        >>> bool(jnp.allclose(jl.merge(base, adapter)["w"], tuned["w"], atol=1e-6))
        True
    """
    if (rank is None) == (energy is None):
        got = "neither" if rank is None else "both"
        raise ConfigError(f"expected exactly one of rank and energy, got {got}")
    if rank is not None:
        check_rank(rank)
    number = isinstance(energy, numbers.Real) and not isinstance(energy, bool)
    if energy is not None and (not number or not 0 < energy <= 1):
        raise ConfigError(
            f"expected an energy in (0, 1], the share of squared singular values to keep; "
            f"got {energy!r}"
        )
    before, after = leaves_by_path(base), leaves_by_path(tuned)
    layouts = getattr(layouts, "targets", layouts)
    expect_type("layouts by path, as plan.targets has them", layouts, Mapping)
    known = {path: _layout_of(path, x) for path, x in layouts.items()}
    _check_trees(before, after, known, ignore)
    entries: dict[str, Entry] = {}
    errors: dict[str, jax.Array] = {}
    for path, layout in sorted(known.items()):
        old, new = jnp.asarray(before[path]), jnp.asarray(after[path])
        dtype = working_dtype(old.dtype, new.dtype)
        if layout is None:
            entries[path] = FullValue(new.astype(dtype), tuple(new.shape))
            errors[path] = jnp.zeros((), dtype)
            continue
        difference = layout.matrices(new.astype(dtype) - old.astype(dtype))
        kept = _rank_of_energy(difference, energy) if rank is None else rank
        a, b, errors[path] = truncate(*dense_factors(difference), kept)
        entries[path] = from_matrices(a, b, layout)
    return Approximation(Adapter(entries), errors)


def resize(adapter: Adapter, rank: int) -> Approximation:
    """An adapter of another rank for every weight.

    A smaller rank keeps the best approximation of ``a b`` in the Frobenius norm, for each matrix of
    a stack, computed from the factors alone (QR of both, SVD of their core; no ``dW`` is formed).
    A larger one appends zeros to ``a`` and ``b``: the update is the same bit for bit, and so are
    the gradients of the entries that were there. Those of the zeros are zero, as each is multiplied
    by the other's: they never move, which makes this the way to give adapters one shape, not to
    train at a larger rank. For that, `combine` the adapter with a fresh one by ``"cat"``.

    Of LoRA-FA and DoRA the factors change and the rest stays; VeRA, LoHa and LoKr become LoRA;
    values trained whole have no rank and are kept.

    Args:
        adapter: The adapter.
        rank: The new rank, at least 1. May exceed min(in, out).

    Returns:
        The adapter, with the same ``scale`` and dtypes, and the relative error for each path, with
        DoRA that of ``a b`` and not of its columns: 0 where the rank did not shrink. Where it did,
        the columns of ``a`` are orthonormal.

    Raises:
        ConfigError: A rank below 1.
        AdapterError: Factors that do not have the shapes of their layout.

    Example:
        >>> import jax.numpy as jnp, jax_lora as jl
        >>> layout = jl.Layout((2, 3), in_axes=(0,), out_axes=(1,))
        >>> factors = jl.LoraFactors(jnp.eye(2), jnp.eye(2, 3), jnp.float32(2), layout)
        >>> adapter = jl.Adapter({"w": factors})
        >>> larger, errors = resize(adapter, 4)
        >>> larger["w"].a.shape, float(errors["w"])
        ((2, 4), 0.0)
        >>> smaller, errors = resize(adapter, 1)  # of two equal singular values one is lost
        >>> smaller["w"].b.shape, round(float(errors["w"]), 4)
        ((1, 3), 0.7071)
    """
    check_rank(rank)
    check_plain(adapter)
    entries: dict[str, Entry] = {}
    errors: dict[str, jax.Array] = {}
    for path, entry in adapter.items():
        if entry.WHOLE:
            entries[path], errors[path] = entry, jnp.zeros((), jnp.float32)
            continue
        inner = entry
        if isinstance(entry, LoraFactors):
            # The factors alone: what a variant has besides is for a weight of any rank.
            plain = entry.without_anchor()
            inner = LoraFactors(plain.a, plain.b, jnp.ones((), plain.b.dtype), plain.layout)
        a, b = factor_matrices(path, inner)
        error = jnp.zeros((), a.dtype)
        if rank < a.shape[-1]:
            a, b, error = truncate(a, b, rank)
        else:
            a, b = pad(a, b, rank)
        dtype = jax.tree.leaves(entry.trained())[0].dtype
        resized = from_matrices(a.astype(dtype), b.astype(dtype), entry.layout)
        if isinstance(entry, LoraFactors):
            parts: dict[str, Any] = {"a": resized.a, "b": resized.b, "a0": None, "b0": None}
            parts |= {"norm": None} if isinstance(entry, DoraFactors) else {}
            entries[path] = dataclasses.replace(entry, **parts)
        else:
            entries[path] = resized
        errors[path] = error
    return Approximation(Adapter(entries), errors)


def _layout_of(path: str, known: Layout | HasLayout) -> Layout | None:
    """The roles of a weight's axes; None if it is to be a value trained whole."""
    if isinstance(known, Layout):
        return known
    whole = isinstance(known, FullValue) or getattr(known, "variant", "") == FullValue.NAME
    if not whole and not hasattr(known, "layout"):
        raise AdapterError(
            f"{path}: expected a Layout or what has one, as plan.targets and adapters do, got "
            f"{type(known).__name__}"
        )
    return None if whole else known.layout


def _rank_of_energy(matrices: jax.Array, energy: Any) -> int:
    """The smallest rank, at least 1, that keeps this share of the squared singular values."""
    if isinstance(matrices, jax.core.Tracer):
        raise ConfigError(
            "expected concrete parameters with energy, which reads the rank off their values, got "
            "traced ones; call extract outside of jax.jit, or pass rank"
        )
    s = np.asarray(singular_values(matrices), np.float64)
    kept = np.cumsum((s.reshape(-1, s.shape[-1]) ** 2).sum(0))
    return max(1, int(np.searchsorted(kept, energy * kept[-1])) + 1) if kept[-1] > 0 else 1


def _check_trees(
    before: dict[str, Any],
    after: dict[str, Any],
    layouts: Mapping[str, Layout | None],
    ignore: str | Sequence[str],
) -> None:
    """Every parameter is in both trees, of one shape, and extracted, ignored or the same."""
    ignored = matching_paths(ignore, before.keys() | after.keys())
    problems = []
    for path in sorted(before.keys() | after.keys()):
        if path not in before or path not in after:
            held = "base" if path in before else "tuned"
            if path in layouts or path not in ignored:
                problems.append(f"{path}: only in the {held} parameters")
            continue
        old, new = before[path], after[path]
        if path in layouts:
            found, layout = (tuple(np.shape(old)), tuple(np.shape(new))), layouts[path]
            expected = found[0] if layout is None else layout.shape
            if found != (expected, expected):
                problems.append(f"{path}: expected shape {expected}, got {found[0]}, {found[1]}")
            elif not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (old, new)):
                problems.append(f"{path}: expected floats, got {old.dtype}, {new.dtype}")
        elif path not in ignored and not _same(path, old, new):
            problems.append(f"{path}: differs and is not extracted")
    for path in layouts:
        if path not in before and path not in after:
            problems.append(f"{path}: no such parameter ({near_misses(path, before)})")
    if problems:
        raise AdapterError(
            "expected two trees that differ only in what is extracted; add layouts, or pass the "
            "rest to ignore:\n  " + "\n  ".join(problems)
        )


def _same(path: str, old: Any, new: Any) -> bool:
    if old is new:
        return True
    if isinstance(old, jax.core.Tracer) or isinstance(new, jax.core.Tracer):
        raise ConfigError(
            f"{path}: expected concrete parameters to compare, got traced ones; call extract "
            "outside of jax.jit, or pass ignore='**'"
        )
    if np.shape(old) != np.shape(new):
        return False
    if getattr(old, "dtype", None) == getattr(new, "dtype", None):
        return bool(np.all(old == new))
    return np.array_equal(np.asarray(old), np.asarray(new))
