"""LoRA: two low-rank factors beside a frozen weight, and its form with one of them frozen."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from jax_lora.adapter import Entry, Layout, Settings, Variant
from jax_lora.errors import AdapterError
from jax_lora.initializers import FROM_WEIGHT, INITIALIZERS
from jax_lora.lowrank import working_dtype
from jax_lora.virtual import virtual_weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraFactors(Variant):
    """The low-rank update of one weight, ``dW = scale * a b`` (Hu et al. 2021, arXiv:2106.09685).

    With an anchor ``a0, b0`` it is ``dW = scale * (a b - a0 b0)``, which lets training start from
    factors whose product is not zero: those of the weight itself, as PiSSA and OLoRA have it. The
    base is not touched, so other adapters of it stay what they are. The difference is computed as
    ``(a - a0) b + a0 (b - b0)``: no large terms cancel, and it is exactly zero at the start.

    Attributes:
        a: ``[*stack, *in, rank]``, trained.
        b: ``[*stack, rank, *out]``, trained.
        scale: A scalar array. It is an argument of the compiled function like ``a`` and ``b``, so
            that changing it compiles nothing, but it is not trained.
        layout: Which axis of the weight each axis of ``a`` and ``b`` is (static).
        a0: What ``a`` was at the start, or None for an update that starts at ``a b``.
        b0: What ``b`` was at the start, or None.
    """

    NAME = "lora"
    TRAINED = frozenset({"a", "b"})
    INITS = (*INITIALIZERS, *FROM_WEIGHT)

    a: jax.Array
    b: jax.Array
    scale: jax.Array
    layout: Layout = dataclasses.field(metadata={"static": True})
    a0: jax.Array | None = None
    b0: jax.Array | None = None

    @property
    def rank(self) -> int:
        """The number of columns of ``a``."""
        return int(self.a.shape[-1])

    @classmethod
    def create(cls, key: jax.Array, w: jax.Array, settings: Settings) -> Self:
        """The factors as ``settings.init`` has them; ``b`` is zero, or else there is an anchor."""
        layout, rank, dtype = settings.matrix, settings.rank, settings.dtype
        arrays: dict[str, Any]
        if settings.init in FROM_WEIGHT:
            start = FROM_WEIGHT[settings.init](layout.matrices(w), rank, settings.scale)
            a, b = (x.astype(dtype) for x in start)
            a, b = a.reshape(layout.a_shape(rank)), b.reshape(layout.b_shape(rank))
            # Copies: a buffer that two leaves share cannot be donated.
            arrays = {"a": a, "b": b, "a0": jnp.array(a), "b0": jnp.array(b)}
        else:
            a = INITIALIZERS[settings.init](key, layout, rank).astype(dtype)
            arrays = {"a": a, "b": jnp.zeros(layout.b_shape(rank), dtype)}
        scale = jnp.asarray(settings.scale, jnp.float32)
        return cls(**arrays, scale=scale, layout=layout, **cls._more(w, settings))

    @classmethod
    def _more(cls, w: jax.Array, settings: Settings) -> dict[str, Any]:
        """The fields that a variant has besides."""
        return {}

    @classmethod
    def shapes(cls, settings: Settings) -> dict[str, tuple[int, ...]]:
        """``a`` and ``b``, and the anchor of the same shapes."""
        layout = settings.matrix
        a, b = layout.a_shape(settings.rank), layout.b_shape(settings.rank)
        return {"a": a, "b": b, "a0": a, "b0": b}

    def problems(self) -> list[str]:
        """What is wrong with the arrays' shapes; empty if nothing is."""
        if (self.a0 is None) != (self.b0 is None):
            return ["expected a0 and b0, or none of them, found one"]
        return super().problems()

    @property
    def settings(self) -> Settings:
        """As far as it can be told from the entry: what it has been made from."""
        settings = super().settings
        if self.a0 is None:
            return settings
        return dataclasses.replace(settings, init=next(iter(FROM_WEIGHT)))

    def axes(self) -> dict[str, tuple[int, ...]]:
        """Those of the layout."""
        a, b = self.layout.a_axes, self.layout.b_axes
        return {"a": a, "b": b, "a0": a, "b0": b}

    @classmethod
    def inner_rank(cls, settings: Settings) -> int:
        """The rank, and twice that with an anchor."""
        return settings.rank * (2 if settings.init in FROM_WEIGHT else 1)

    def virtual(self, w: jax.Array, path: str) -> Any:
        """``W + scale * a b``."""
        return virtual_weight(w, self.without_anchor(), path)

    def update(self, w: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """``a`` and ``scale * b``."""
        plain = self.without_anchor()
        return plain.a, plain.b * plain.scale.astype(plain.b.dtype)

    def without_anchor(self) -> Self:
        """The same update as one product, in which no gradient reaches what is not trained."""
        parts: dict[str, Any] = {name: self._held(name) for name in ("a", "b")}
        if self.a0 is None or self.b0 is None:
            return dataclasses.replace(self, **parts)
        a, b = parts["a"], parts["b"]
        a0, b0 = jax.lax.stop_gradient((self.a0, self.b0))
        stacked = len(self.layout.stack_axes)
        parts["a"] = jnp.concatenate([a - a0, a0], axis=-1)
        parts["b"] = jnp.concatenate([b, b - b0], axis=stacked)
        return dataclasses.replace(self, **parts, a0=None, b0=None)

    def _held(self, name: str) -> jax.Array:
        value = getattr(self, name)
        return value if name in self.TRAINED else jax.lax.stop_gradient(value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraFA(LoraFactors):
    """LoRA with ``a`` frozen at its start: ``dW = scale * a b`` with ``b`` trained alone.

    The gradient of ``b`` needs ``x a``, of ``rank`` numbers for each row, and not ``x``: what has
    to be kept for the backward pass shrinks.

    References:
        Zhang et al. 2023, LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models
        Fine-tuning, arXiv:2308.03303.
    """

    NAME = "lora-fa"
    TRAINED = frozenset({"b"})


def factor_matrices(
    path: str, entry: Entry, w: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The update of an entry as ``a: [*stack, in, k]`` and ``b: [*stack, k, out]``.

    They are at least float32, and the scale is in ``b``. A value trained whole is a matrix of one
    row.

    Raises:
        AdapterError: The arrays do not have the shapes of their layout, or the update depends on
            the parameter and there is none.
    """
    if problems := entry.problems():
        raise AdapterError(
            f"{path}: {problems[0]}; an adapter with a leading axis goes through jax.vmap"
        )
    if not entry.LINEAR and w is None:
        raise AdapterError(
            f"{path}: the update of {entry} depends on the parameter it is for; expected the base "
            "parameters, got none: pass params=..."
        )
    wide = jax.tree.map(_wide, entry)
    a, b = wide.update(w)
    dtype = working_dtype(a.dtype, b.dtype)
    if not hasattr(entry, "layout"):  # a value trained whole: as a matrix of one row
        return a.astype(dtype), b.astype(dtype)
    layout = entry.layout
    a = a.astype(dtype).reshape(*layout.stack, layout.fan_in, -1)
    return a, b.astype(dtype).reshape(*layout.stack, -1, layout.fan_out)


def _wide(x: jax.Array) -> jax.Array:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(working_dtype(x.dtype)) if floating else x


def from_matrices(
    a: jax.Array, b: jax.Array, layout: Layout, scale: jax.Array | None = None
) -> LoraFactors:
    """The entry with factors ``a: [*stack, in, rank]``, ``b: [*stack, rank, out]``; scale 1."""
    rank = a.shape[-1]
    scale = jnp.ones((), jnp.float32) if scale is None else scale
    return LoraFactors(
        a.reshape(layout.a_shape(rank)), b.reshape(layout.b_shape(rank)), scale, layout
    )
