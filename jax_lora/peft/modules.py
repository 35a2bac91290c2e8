"""Entries of an adapter as the factors of single modules, in torch's shapes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.lowrank import working_dtype
from jax_lora.peft.parts import narrowed, scaled
from jax_lora.peft.places import Place
from jax_lora.variants import DoraFactors, LoraFactors, factor_matrices


@dataclasses.dataclass(frozen=True)
class Factors:
    """The factors of one module, as torch has them.

    Attributes:
        a: ``[rank, in]``, or as a convolution.
        b: ``[out, rank]``, or as a convolution.
        scale: What multiplies their product.
        magnitude: DoRA's, or None.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """The rank."""
        return int(self.a.shape[0])

    def folded(self) -> Factors:
        """The same update with scale 1."""
        return dataclasses.replace(self, b=scaled(self.b, self.scale), scale=1.0)

    def padded(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Both with zeros up to a rank."""
        more = rank - self.rank
        a = np.pad(self.a, [(0, more), *[(0, 0)] * (self.a.ndim - 1)])
        return a, np.pad(self.b, [(0, 0), (0, more), *[(0, 0)] * (self.b.ndim - 2)])


def split(path: str, entry: Any, w: Any, places: list[Place], *, dora: bool) -> dict[str, Factors]:
    """The factors of each module that one entry adapts, by the name of torch's parameter.

    They have the entry's dtype, or float32 where that would round them.

    Args:
        path: Where the entry is.
        entry: The entry, of any variant whose update is a product.
        w: The parameter, where the update depends on it or its magnitudes are wanted.
        places: The modules.
        dora: Whether they are to be DoRA.
    """
    dtype = np.dtype(jax.tree.leaves(entry.trained())[0].dtype)
    plain, scale, magnitude = entry, 1.0, None
    if isinstance(entry, LoraFactors):
        held = entry.without_anchor()
        plain = LoraFactors(held.a, held.b, held.scale, held.layout)
    if plain.LINEAR:
        scale = float(plain.scale)
        plain = dataclasses.replace(plain, scale=jnp.ones((), jnp.float32))
    a, b = factor_matrices(path, plain, None if plain.LINEAR else w)
    if dora:
        magnitude = _magnitude(entry, w, a, b, scale)
    a_np, b_np = (narrowed(np.asarray(x), dtype) for x in (a, b))
    factors = {}
    for place in places:
        m = None
        if magnitude is not None:
            m = magnitude[place.index][place.outs].reshape(place.magnitude_shapes()[0])
        a_part = place.a_to_torch(a_np[place.index])
        b_part = place.b_to_torch(b_np[place.index][:, place.outs])
        factors[place.name] = Factors(a_part, b_part, scale, m)
    return factors


def _magnitude(entry: Any, w: Any, a: jax.Array, b: jax.Array, scale: float) -> np.ndarray:
    """``[*stack, out]``: the entry's, or those with which DoRA is the same update."""
    layout = entry.layout
    if isinstance(entry, DoraFactors):
        return np.asarray(entry.magnitude).reshape(*layout.stack, layout.fan_out)
    full = layout.matrices(jnp.asarray(w).astype(working_dtype(w.dtype)))
    moved = full + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return np.asarray(jnp.sqrt((moved**2).sum(-2)))
