"""The labelled factored weight that stands for ``W + scale * a b`` during interpretation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from string import ascii_letters
from typing import Any

import jax
import jax.numpy as jnp

from jax_lora.adapter import RANK, LoraFactors


def wider(one: Any, other: Any) -> Any:
    """The dtype that holds both, also where the user has made mixing dtypes an error."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(one, other)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraWeight:
    """A weight that is never formed: ``W + scale * a b``, with every factor axis labelled.

    ``a_axes[k]`` is the axis of the virtual weight that axis ``k`` of ``a`` is, or ``RANK``.
    Structural operations act on ``w`` and on the factor axes they concern, and relabel; the order
    of a factor's axes is free, so none of them has to transpose a factor.

    Attributes:
        w: The frozen weight, of the virtual weight's shape and dtype.
        a: The input factor.
        b: The output factor.
        scale: A scalar array.
        a_axes: Labels of ``a``'s axes (static).
        b_axes: Labels of ``b``'s axes (static).
        path: The parameter's path, for reports and errors (static).
    """

    w: jax.Array
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    a_axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    b_axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return tuple(self.w.shape)

    @property
    def ndim(self) -> int:
        """The number of axes of the weight."""
        return len(self.w.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the weight."""
        return self.w.dtype

    def factors(self) -> tuple[tuple[jax.Array, tuple[int, ...]], ...]:
        """Both factors with their labels."""
        return ((self.a, self.a_axes), (self.b, self.b_axes))

    def map_factors(
        self, w: jax.Array, fun: Callable[[jax.Array, tuple[int, ...]], tuple[jax.Array, Any]]
    ) -> LoraWeight:
        """The weight with ``w`` replaced and ``fun(factor, labels)`` for each factor."""
        (a, a_axes), (b, b_axes) = (fun(f, axes) for f, axes in self.factors())
        return dataclasses.replace(self, w=w, a=a, b=b, a_axes=tuple(a_axes), b_axes=tuple(b_axes))

    def delta(self) -> jax.Array:
        """``scale * a b`` in the factors' dtype, of size 1 along axes that neither factor has."""
        letter = {RANK: "z"} | dict(enumerate(ascii_letters[: self.ndim]))
        held = [i for i in range(self.ndim) if i in self.a_axes or i in self.b_axes]
        spec = ",".join("".join(letter[i] for i in axes) for _, axes in self.factors())
        delta = jnp.einsum(
            f"{spec}->{''.join(letter[i] for i in held)}",
            self.a * self.scale.astype(self.a.dtype),
            self.b,
            precision=jax.lax.Precision.HIGHEST,
        )
        return delta.reshape([n if i in held else 1 for i, n in enumerate(self.shape)])

    def materialize(self) -> jax.Array:
        """``W + scale * a b`` as an ordinary array of ``W``'s dtype, summed in the wider dtype."""
        wide = wider(self.w.dtype, self.a.dtype)
        return (self.w.astype(wide) + self.delta().astype(wide)).astype(self.w.dtype)


def virtual_weight(w: jax.Array, factors: LoraFactors, path: str) -> LoraWeight:
    """The virtual weight of a parameter and its adapter entry."""
    layout = factors.layout
    return LoraWeight(
        w, factors.a, factors.b, factors.scale, layout.a_axes, layout.b_axes, path=path
    )
