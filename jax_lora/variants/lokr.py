"""LoKr: the Kronecker product of a small matrix and a low-rank one."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp

from jax_lora.adapter import RANK, Layout, Settings, Variant
from jax_lora.virtual import virtual_weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LokrFactors(Variant):
    r"""Low-rank Kronecker product: ``dW = scale * c (x) (a b)``.

    With the in- and out-axes flattened and split as ``in = i1 i2`` and ``out = o1 o2``, each ``i1``
    and ``o1`` the largest divisor up to the root, ``dW[(i1, i2), (o1, o2)] = scale * c[i1, o1]
    sum_r a[i2, r] b[r, o2]``. It is one product of factors whose rank is ``rank * min(i1, o1)``:
    ``c`` is taken into one of them and an identity into the other.

    Attributes:
        c: ``[*stack, i1, o1]``, trained, uniform on ``±1/sqrt(i1)`` at the start.
        a: ``[*stack, i2, rank]``, trained, uniform on ``±1/sqrt(i2)`` at the start.
        b: ``[*stack, rank, o2]``, trained, zero at the start.
        scale: A scalar array.
        layout: Which axis of the weight is an in-, out- or stack-axis (static).

    References:
        Yeh et al. 2023, Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
        Evaluation, arXiv:2309.14859. Edalati et al. 2022, KronA, arXiv:2212.10650.
    """

    NAME = "lokr"
    TRAINED = frozenset({"c", "a", "b"})
    MAX_RANK = False

    c: jax.Array
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    layout: Layout = dataclasses.field(metadata={"static": True})

    @property
    def rank(self) -> int:
        """The number of columns of ``a``."""
        return int(self.a.shape[-1])

    @classmethod
    def create(cls, key: jax.Array, w: jax.Array, settings: Settings) -> Self:
        """Uniform ``c`` and ``a``, and ``b`` zero."""
        shapes, dtype = cls.shapes(settings), settings.dtype
        drawn = {}
        for name, k in zip(("c", "a"), jax.random.split(key), strict=True):
            bound = 1 / math.sqrt(shapes[name][-2])
            x = jax.random.uniform(k, shapes[name], jnp.float32, -bound, bound)
            drawn[name] = x.astype(dtype)
        return cls(
            **drawn,
            b=jnp.zeros(shapes["b"], dtype),
            scale=jnp.asarray(settings.scale, jnp.float32),
            layout=settings.matrix,
        )

    @classmethod
    def shapes(cls, settings: Settings) -> dict[str, tuple[int, ...]]:
        """Of the small matrix and the two factors."""
        layout, rank = settings.matrix, settings.rank
        (i1, i2), (o1, o2) = split(layout.fan_in), split(layout.fan_out)
        stack = layout.stack
        return {"c": (*stack, i1, o1), "a": (*stack, i2, rank), "b": (*stack, rank, o2)}

    def axes(self) -> dict[str, tuple[int, ...]]:
        """The stack's; the others are parts of the parameter's axes, and whole."""
        return dict.fromkeys(("c", "a", "b"), (*self.layout.stack_axes, RANK, RANK))

    @classmethod
    def inner_rank(cls, settings: Settings) -> int:
        """The rank, once for each row or column of the small matrix."""
        layout = settings.matrix
        return settings.rank * min(split(layout.fan_in)[0], split(layout.fan_out)[0])

    def virtual(self, w: jax.Array, path: str) -> Any:
        """``W + scale * c (x) (a b)``."""
        a, b = self._product()
        plain = dataclasses.replace(self, a=a, b=b)
        return virtual_weight(w, plain, path)

    def update(self, w: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """The Kronecker product as one of factors, the scale in ``b``."""
        a, b = self._product()
        return a, b * self.scale.astype(b.dtype)

    def _product(self) -> tuple[jax.Array, jax.Array]:
        i1, o1 = self.c.shape[-2:]
        left = o1 <= i1
        one = jnp.eye(min(i1, o1), dtype=self.c.dtype)
        one = jnp.broadcast_to(one, (*self.c.shape[:-2], *one.shape))
        a = _kron(self.c if left else one, self.a)
        b = _kron(one if left else self.c, self.b)
        rank, layout = a.shape[-1], self.layout
        return a.reshape(layout.a_shape(rank)), b.reshape(layout.b_shape(rank))


def split(size: int) -> tuple[int, int]:
    """Two factors of a size, the first the largest up to its root.

    Example:
        >>> split(768), split(10), split(7)
        ((24, 32), (2, 5), (1, 7))
    """
    first = next(k for k in range(math.isqrt(size), 0, -1) if size % k == 0)
    return first, size // first


def _kron(left: jax.Array, right: jax.Array) -> jax.Array:
    """The Kronecker product of the matrices of two stacks."""
    product = left[..., :, None, :, None] * right[..., None, :, None, :]
    rows, columns = left.shape[-2] * right.shape[-2], left.shape[-1] * right.shape[-1]
    return product.reshape(*left.shape[:-2], rows, columns)
