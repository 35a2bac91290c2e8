"""LoHa: the elementwise product of two low-rank matrices."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from jax_lora.adapter import Layout, Settings, Variant
from jax_lora.virtual import Product, virtual_weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LohaFactors(Variant):
    r"""Low-rank Hadamard product: ``dW = scale * (a1 b1) * (a2 b2)``, elementwise.

    Two products of rank ``r`` make an update of rank up to ``r^2``. It is one product of factors,
    ``a[i, (p, q)] = a1[i, p] a2[i, q]`` and ``b[(p, q), o] = b1[p, o] b2[q, o]``, so a weight stays
    factored as with LoRA of rank ``r^2``.

    Attributes:
        a1: ``[*stack, *in, rank]``, trained, standard normal at the start.
        b1: ``[*stack, rank, *out]``, trained, normal with standard deviation 0.1 at the start.
        a2: ``[*stack, *in, rank]``, trained, standard normal at the start.
        b2: ``[*stack, rank, *out]``, trained, zero at the start.
        scale: A scalar array.
        layout: Which axis of the weight each axis of the factors is (static).

    References:
        Hyeon-Woo et al. 2021, FedPara: Low-Rank Hadamard Product for Communication-Efficient
        Federated Learning, arXiv:2108.06098. Yeh et al. 2023, Navigating Text-To-Image
        Customization: From LyCORIS Fine-Tuning to Model Evaluation, arXiv:2309.14859, whose start
        this is.
    """

    NAME = "loha"
    TRAINED = frozenset({"a1", "b1", "a2", "b2"})
    MAX_RANK = False

    a1: jax.Array
    b1: jax.Array
    a2: jax.Array
    b2: jax.Array
    scale: jax.Array
    layout: Layout = dataclasses.field(metadata={"static": True})

    @property
    def rank(self) -> int:
        """The rank of each of the two products."""
        return int(self.a1.shape[-1])

    @classmethod
    def create(cls, key: jax.Array, w: jax.Array, settings: Settings) -> Self:
        """Normal ``a1``, ``b1`` and ``a2``, and ``b2`` zero."""
        deviations = {"a1": 1.0, "b1": 0.1, "a2": 1.0, "b2": 0.0}
        keys = jax.random.split(key, len(deviations))
        shapes = cls.shapes(settings)
        drawn = {}
        for (name, deviation), k in zip(deviations.items(), keys, strict=True):
            x = deviation * jax.random.normal(k, shapes[name], jnp.float32)
            drawn[name] = x.astype(settings.dtype)
        scale = jnp.asarray(settings.scale, jnp.float32)
        return cls(**drawn, scale=scale, layout=settings.matrix)

    @classmethod
    def shapes(cls, settings: Settings) -> dict[str, tuple[int, ...]]:
        """Of the factors of both products."""
        layout, rank = settings.matrix, settings.rank
        a, b = layout.a_shape(rank), layout.b_shape(rank)
        return {"a1": a, "b1": b, "a2": a, "b2": b}

    def axes(self) -> dict[str, tuple[int, ...]]:
        """Those of the layout."""
        a, b = self.layout.a_axes, self.layout.b_axes
        return {"a1": a, "b1": b, "a2": a, "b2": b}

    @classmethod
    def inner_rank(cls, settings: Settings) -> int:
        """The square of the rank."""
        return settings.rank**2

    def virtual(self, w: jax.Array, path: str) -> Any:
        """``W + scale * (a1 b1) * (a2 b2)``."""
        return virtual_weight(w, self._product(), path)

    def update(self, w: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Both products as one, the scale in ``b``."""
        plain = self._product()
        return plain.a, plain.b * plain.scale.astype(plain.b.dtype)

    def _product(self) -> Product:
        rank, stacked = self.rank**2, len(self.layout.stack_axes)
        a = self.a1[..., :, None] * self.a2[..., None, :]
        b = jnp.expand_dims(self.b1, stacked + 1) * jnp.expand_dims(self.b2, stacked)
        a, b = a.reshape(self.layout.a_shape(rank)), b.reshape(self.layout.b_shape(rank))
        return Product(a, b, self.scale, self.layout)
