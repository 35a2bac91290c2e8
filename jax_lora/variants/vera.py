"""VeRA: random factors that stay as they are, and trained vectors between and behind them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp

from jax_lora.adapter import RANK, Layout, Settings, Variant
from jax_lora.virtual import virtual_weight

#: What ``d`` starts at, the paper's choice.
_D_START = 0.1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VeraFactors(Variant):
    """Vector-based random matrix adaptation: ``dW = scale * a diag(d) b diag(g)``.

    ``a`` and ``b`` are random and frozen, drawn as He et al. (arXiv:1502.01852) do, the vectors
    ``d`` and ``g`` are trained; ``g`` starts at zero. The rank can be large: it costs one trained
    number for each matrix. The paper has one pair of random matrices for all layers of a shape;
    here they are drawn for each parameter from its own key, and travel with the entry.

    Attributes:
        a: ``[*stack, *in, rank]``, frozen.
        b: ``[*stack, rank, *out]``, frozen.
        d: ``[*stack, rank]``, trained, 0.1 at the start.
        g: ``[*stack, *out]``, trained, zero at the start.
        scale: A scalar array.
        layout: Which axis of the weight each axis of ``a`` and ``b`` is (static).

    References:
        Kopiczko et al. 2023, VeRA: Vector-based Random Matrix Adaptation, arXiv:2310.11454.
    """

    NAME = "vera"
    TRAINED = frozenset({"d", "g"})
    MAX_RANK = False

    a: jax.Array
    b: jax.Array
    d: jax.Array
    g: jax.Array
    scale: jax.Array
    layout: Layout = dataclasses.field(metadata={"static": True})

    @property
    def rank(self) -> int:
        """The number of columns of ``a``."""
        return int(self.a.shape[-1])

    @classmethod
    def create(cls, key: jax.Array, w: jax.Array, settings: Settings) -> Self:
        """Random ``a`` and ``b``, ``d`` constant and ``g`` zero."""
        shapes, dtype = cls.shapes(settings), settings.dtype
        fans = {"a": settings.matrix.fan_in, "b": settings.rank}
        drawn = {}
        for (name, fan_in), k in zip(fans.items(), jax.random.split(key), strict=True):
            bound = math.sqrt(6 / fan_in)
            x = jax.random.uniform(k, shapes[name], jnp.float32, -bound, bound)
            drawn[name] = x.astype(dtype)
        return cls(
            **drawn,
            d=jnp.full(shapes["d"], _D_START, dtype),
            g=jnp.zeros(shapes["g"], dtype),
            scale=jnp.asarray(settings.scale, jnp.float32),
            layout=settings.matrix,
        )

    @classmethod
    def shapes(cls, settings: Settings) -> dict[str, tuple[int, ...]]:
        """Of the random matrices and the vectors."""
        layout, rank = settings.matrix, settings.rank
        return {
            "a": layout.a_shape(rank),
            "b": layout.b_shape(rank),
            "d": (*layout.stack, rank),
            "g": layout.column_shape,
        }

    def axes(self) -> dict[str, tuple[int, ...]]:
        """Those of the layout, and of the vectors."""
        layout = self.layout
        d, g = (*layout.stack_axes, RANK), layout.column_axes
        return {"a": layout.a_axes, "b": layout.b_axes, "d": d, "g": g}

    def virtual(self, w: jax.Array, path: str) -> Any:
        """``W + scale * a (d b g)``."""
        return virtual_weight(w, self._product(), path)

    def update(self, w: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """``a`` and ``scale * d b g``."""
        plain = self._product()
        return plain.a, plain.b * plain.scale.astype(plain.b.dtype)

    def _product(self) -> Self:
        a, b = jax.lax.stop_gradient((self.a, self.b))
        stacked = len(self.layout.stack_axes)
        d = self.d.reshape(*self.d.shape, *[1] * len(self.layout.out_axes))
        return dataclasses.replace(self, a=a, b=d * b * jnp.expand_dims(self.g, stacked))
