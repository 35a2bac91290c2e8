"""Full training of a parameter, or of some of its rows, in the same adapter as everything else."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.adapter import Layout, Settings, Variant
from jax_lora.virtual import Product, virtual_weight, wider


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullValue(Variant):
    """A parameter that is trained whole: a norm, a bias, a head. ``W' = value``.

    The value is a copy: the base keeps its own. In float32 beside a bfloat16 base it is what is
    known as a master weight, cast where it is used.

    Attributes:
        value: ``[*shape]``, trained, the parameter's at the start.
        sizes: The parameter's shape (static).
    """

    NAME = "full"
    TRAINED = frozenset({"value"})
    LINEAR = False
    MAX_RANK = False
    WHOLE = True

    value: jax.Array
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return self.sizes

    @property
    def rank(self) -> int:
        """None: 0."""
        return 0

    @classmethod
    def create(cls, key: jax.Array, w: jax.Array, settings: Settings) -> Self:
        """A copy of the parameter, of no narrower dtype than its own."""
        return cls(jnp.array(w, wider(w.dtype, settings.dtype)), settings.shape)

    @classmethod
    def shapes(cls, settings: Settings) -> dict[str, tuple[int, ...]]:
        """That of the parameter."""
        return {"value": settings.shape}

    def axes(self) -> dict[str, tuple[int, ...]]:
        """The parameter's."""
        return {"value": tuple(range(len(self.sizes)))}

    @classmethod
    def inner_rank(cls, settings: Settings) -> int:
        """None: 0."""
        return 0

    def virtual(self, w: jax.Array, path: str) -> Any:
        """The value, an ordinary array."""
        return self.value.astype(w.dtype)

    def update(self, w: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """``W' - W`` as one matrix of a single row, and the factor 1."""
        assert w is not None
        wide = wider(w.dtype, self.value.dtype)
        difference = self.value.astype(wide) - w.astype(wide)
        return jnp.ones((1, 1), wide), difference.reshape(1, -1)

    def __str__(self) -> str:
        return "full"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowValues(Variant):
    """Some rows of a parameter that are trained whole: new tokens of an embedding.

    ``W'[rows] = value``, and all others are those of the base. It is the update ``dW = a b`` with
    one-hot columns ``a[rows[k], k] = 1`` and ``b = value - W[rows]``, so the table is not copied,
    and a head that is tied to it has the rows too.

    Attributes:
        value: ``[*stack, n, *out]``, trained, the parameter's rows at the start.
        rows: The n rows, along the one in-axis (static: `jax.grad` refuses arrays of integers).
        layout: Which axis of the parameter is which (static).
    """

    NAME = "rows"
    TRAINED = frozenset({"value"})
    LINEAR = False
    MAX_RANK = False
    WHOLE = True

    value: jax.Array
    rows: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})

    @property
    def rank(self) -> int:
        """The number of rows."""
        return len(self.rows)

    @classmethod
    def create(cls, key: jax.Array, w: jax.Array, settings: Settings) -> Self:
        """A copy of the rows, of no narrower dtype than their own."""
        value = _rows_of(w, settings.rows, settings.matrix)
        value = value.astype(wider(w.dtype, settings.dtype))
        return cls(value, settings.rows, settings.matrix)

    @classmethod
    def shapes(cls, settings: Settings) -> dict[str, tuple[int, ...]]:
        """That of the rows."""
        return {"value": settings.matrix.b_shape(len(settings.rows))}

    def axes(self) -> dict[str, tuple[int, ...]]:
        """The parameter's, the rows whole."""
        return {"value": self.layout.b_axes}

    @classmethod
    def inner_rank(cls, settings: Settings) -> int:
        """The number of rows."""
        return len(settings.rows)

    @property
    def settings(self) -> Settings:
        """As far as it can be told from the entry: what it has been made from."""
        return dataclasses.replace(super().settings, rows=self.rows)

    def problems(self) -> list[str]:
        """What is wrong with the rows, or with the shape of their values."""
        if len(self.layout.in_axes) != 1:
            return [f"expected rows along one in-axis, found in-axes {self.layout.in_axes}"]
        beyond = [k for k in self.rows if not 0 <= k < self.layout.fan_in]
        if beyond:
            return [f"expected rows from 0 to {self.layout.fan_in - 1}, found {beyond}"]
        return super().problems()

    def virtual(self, w: jax.Array, path: str) -> Any:
        """``W + a b``."""
        return virtual_weight(w, self._product(w), path)

    def update(self, w: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """The one-hot columns and what is added to the rows."""
        assert w is not None
        product = self._product(w)
        return product.a, product.b

    def _product(self, w: jax.Array) -> Product:
        layout, dtype = self.layout, self.value.dtype
        columns = jax.nn.one_hot(np.array(self.rows), layout.fan_in, axis=0, dtype=dtype)
        a = jnp.broadcast_to(columns, (*layout.stack, *columns.shape))
        b = self.value - _rows_of(w, self.rows, layout).astype(dtype)
        return Product(a.reshape(layout.a_shape(self.rank)), b, jnp.ones((), dtype), layout)

    def __str__(self) -> str:
        return f"{self.rank} rows"


def _rows_of(w: jax.Array, rows: tuple[int, ...], layout: Layout) -> jax.Array:
    """``[*stack, n, *out]``: the rows of each matrix of the stack."""
    (axis,) = layout.in_axes
    taken = jnp.take(w, np.array(rows), axis=axis, mode="clip")
    return jnp.transpose(taken, (*layout.stack_axes, axis, *layout.out_axes))
