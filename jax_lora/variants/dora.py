"""DoRA: the magnitude of each column of a weight trained apart from its direction."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from string import ascii_letters
from typing import Any

import jax
import jax.numpy as jnp

from jax_lora.adapter import (
    RANK,
    Adapter,
    Layout,
    Settings,
    check_fits,
    check_plain,
    leaves_by_path,
)
from jax_lora.lowrank import dense_factors
from jax_lora.variants.lora import LoraFactors
from jax_lora.virtual import sharded_like, wider

#: A second rank axis, beside that of the same factor.
_OTHER_RANK = RANK - 1
#: The letter of each label in an einsum.
_LETTERS = {RANK: "Z", _OTHER_RANK: "Y"} | dict(
    enumerate(ascii_letters.replace("Z", "").replace("Y", ""))
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DoraFactors(LoraFactors):
    r"""Weight-decomposed LoRA: ``W' = m * (W + scale * a b) / |W + scale * a b|``.

    ``|.|`` is the norm of each column: over the in-axes, for each output of each matrix of the
    stack. As in the paper (section 4.3) no gradient flows through it. It is computed without
    forming the sum, as ``|W|^2 + 2 s <W, a b> + s^2 |a b|^2``, at the cost of ``rank`` rows of a
    matrix product with ``W`` for each evaluation; `cache_norms` saves that where ``a`` and ``b`` do
    not change any more. With ``g = m / |W + scale * a b|`` a product is ``(x W) g + s (x a) (b
    g)``.

    A column whose norm is zero stays as it is.

    Attributes:
        magnitude: ``m: [*stack, *out]``, trained, the norms of ``W`` at the start.
        base_norm: ``|W|: [*stack, *out]``, the norms of the weight that it was made for.
        norm: ``|W + scale * a b|: [*stack, *out]`` where it is cached, or None.

    References:
        Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv:2402.09353.
    """

    NAME = "dora"
    TRAINED = frozenset({"a", "b", "magnitude"})
    LINEAR = False

    magnitude: jax.Array = dataclasses.field(kw_only=True)
    base_norm: jax.Array = dataclasses.field(kw_only=True)
    norm: jax.Array | None = dataclasses.field(kw_only=True, default=None)

    @classmethod
    def _more(cls, w: jax.Array, settings: Settings) -> dict[str, Any]:
        norm = column_norms(w, settings.matrix, settings.dtype)
        return {"magnitude": norm, "base_norm": jnp.array(norm)}

    @classmethod
    def shapes(cls, settings: Settings) -> dict[str, tuple[int, ...]]:
        """Those of LoRA, and the norms."""
        norms = dict.fromkeys(("magnitude", "base_norm", "norm"), settings.matrix.column_shape)
        return super().shapes(settings) | norms

    def axes(self) -> dict[str, tuple[int, ...]]:
        """Those of LoRA, and the columns'."""
        names = ("magnitude", "base_norm", "norm")
        return super().axes() | dict.fromkeys(names, self.layout.column_axes)

    @classmethod
    def multiply_adds(cls, settings: Settings) -> int:
        """Those of ``a^T W``, in each evaluation."""
        return cls.inner_rank(settings) * math.prod(settings.shape)

    def virtual(self, w: jax.Array, path: str) -> Any:
        """``W g + scale * a (b g)`` with ``g = m / norm``."""
        plain = self.without_anchor()
        norm = plain._norm(w) if self.norm is None else self.norm
        norm = jax.lax.stop_gradient(norm)
        one = jnp.ones_like(norm)
        gain = jnp.where(norm > 0, self.magnitude / jnp.where(norm > 0, norm, one), one)
        stacked = len(self.layout.stack_axes)
        spread = jnp.expand_dims(gain, stacked).astype(plain.b.dtype)
        weight = LoraFactors.virtual(dataclasses.replace(plain, b=plain.b * spread), w, path)
        gain_axes = (*self.layout.column_axes, RANK)
        return dataclasses.replace(weight, gain=gain[..., None], gain_axes=gain_axes)

    def update(self, w: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """``W' - W``, which has full rank, and an identity."""
        assert w is not None
        wide = _wide(w, self.a.dtype)
        new = self.virtual(wide, "").materialize()
        a, b = dense_factors(self.layout.matrices(new - wide))
        k = a.shape[-1]
        return a.reshape(self.layout.a_shape(k)), b.reshape(self.layout.b_shape(k))

    def _norm(self, w: jax.Array) -> jax.Array:
        """``|W + scale * a b|``; for ``a b = 0`` the norms it was made with, bit for bit."""
        layout = self.layout
        axes = tuple(range(len(self.shape)))
        column = layout.column_axes
        dtype = self.base_norm.dtype
        w, a, b, scale = (
            jax.lax.stop_gradient(x.astype(wider(x.dtype, dtype)))
            for x in (w, self.a, self.b, self.scale)
        )

        def product(left: jax.Array, right: jax.Array, *labels: Sequence[int]) -> jax.Array:
            """Of the labels of both operands and of the result; split as W where that is split."""
            return jnp.einsum(
                "{},{}->{}".format(*("".join(_LETTERS[i] for i in part) for part in labels)),
                left,
                right,
                precision=jax.lax.Precision.HIGHEST,
                out_sharding=sharded_like(w, axes, labels[-1]),
            )

        other = [_OTHER_RANK if i == RANK else i for i in layout.a_axes]
        square = (*layout.stack_axes, RANK, _OTHER_RANK)
        turned = [_OTHER_RANK if i == RANK else i for i in layout.b_axes]
        along = product(w, a, axes, layout.a_axes, layout.b_axes)
        mixed = product(along, b, layout.b_axes, layout.b_axes, column)
        gram = product(a, a, layout.a_axes, other, square)
        own = product(gram, b, square, layout.b_axes, turned)
        own = product(own, b, turned, turned, column)
        change = 2 * scale * mixed + scale**2 * own
        # The sum with zeros is split as they are, where shardings are part of the types.
        base = self.base_norm + jnp.zeros_like(change)
        return jnp.where(change == 0, base, jnp.sqrt(jnp.maximum(base**2 + change, 0)))


def column_norms(w: jax.Array, layout: Layout, dtype: str = "float32") -> jax.Array:
    """``|W|: [*stack, *out]``, in float32 at least, whatever the factors are.

    They are few, and a rounded norm would be felt by the whole column.
    """
    norm = jnp.sqrt((_wide(w, dtype) ** 2).sum(layout.in_axes))
    order = sorted(layout.column_axes)
    return jnp.transpose(norm, [order.index(i) for i in layout.column_axes])


def cache_norms(params: Any, adapter: Adapter) -> Adapter:
    """The adapter with the norms of its DoRA weights computed once, for inference.

    The result is for these parameters and is not for training: its norms stay where they are.

    Args:
        params: The base parameters.
        adapter: The adapter; entries of other variants are kept as they are.

    Returns:
        A new adapter.

    Raises:
        AdapterError: The adapter does not fit the parameters.
    """
    check_plain(adapter)
    check_fits(params, adapter)
    leaves = leaves_by_path(params)

    def cached(path: str, entry: Any) -> Any:
        if not isinstance(entry, DoraFactors):
            return entry
        return dataclasses.replace(entry, norm=entry.without_anchor()._norm(leaves[path]))

    return Adapter({path: cached(path, entry) for path, entry in adapter.items()})


def _wide(w: jax.Array, dtype: Any) -> jax.Array:
    return w.astype(wider(wider(w.dtype, dtype), "float32"))
