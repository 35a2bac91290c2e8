"""The labelled factored weight that stands for an adapted parameter during interpretation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from string import ascii_letters
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_lora.adapter import RANK, Layout


def wider(one: Any, other: Any) -> Any:
    """The dtype that holds both, also where the user has made mixing dtypes an error."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(one, other)


def sharded_like(
    array: jax.Array, labels: Sequence[int], wanted: Sequence[int]
) -> NamedSharding | None:
    """The sharding of what has some of an array's axes, each split as there.

    Args:
        array: The array.
        labels: One label for each of its axes.
        wanted: The labels of the axes of the result; others than the array's are whole.

    Returns:
        The sharding, or None where shardings are not part of the types.
    """
    sharding = jax.typeof(array).sharding
    if not isinstance(sharding, NamedSharding) or AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    spec = (*sharding.spec, *[None] * (array.ndim - len(sharding.spec)))
    split = dict(zip(labels, spec, strict=True))
    return NamedSharding(sharding.mesh, PartitionSpec(*[split.get(label) for label in wanted]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraWeight:
    """A weight that is never formed: ``W * gain + scale * a b``, with every factor axis labelled.

    ``a_axes[k]`` is the axis of the virtual weight that axis ``k`` of ``a`` is, or ``RANK``.
    Structural operations act on ``w`` and on the factor axes they concern, and relabel; the order
    of a factor's axes is free, so none of them has to transpose a factor.

    Attributes:
        w: The frozen weight, of the virtual weight's shape and dtype.
        a: The input factor, or one out of many.
        b: The output factor, or one out of many.
        scale: A scalar array; one number for each token where each selects factors of its own.
        a_axes: Labels of ``a``'s axes (static).
        b_axes: Labels of ``b``'s axes (static).
        path: The parameter's path, for reports and errors (static).
        gain: What multiplies ``w``, one number for each output, or None for 1. Like the factors it
            has an axis labelled ``RANK``, of size 1.
        gain_axes: Labels of ``gain``'s axes (static).
        drop: Dropout of the input of ``scale * a b``, or None for none.
    """

    w: jax.Array
    a: Any
    b: Any
    scale: jax.Array
    a_axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    b_axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(metadata={"static": True})
    gain: jax.Array | None = None
    gain_axes: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    drop: Drop | None = None

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

    def factors(self) -> tuple[tuple[Any, tuple[int, ...]], ...]:
        """Both factors with their labels."""
        return ((self.a, self.a_axes), (self.b, self.b_axes))

    def parts(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """All labelled arrays: the factors, and gain and dropout keys where there are any."""
        parts: dict[str, tuple[Any, tuple[int, ...]]] = {
            "a": (self.a, self.a_axes),
            "b": (self.b, self.b_axes),
        }
        if self.gain is not None:
            parts["gain"] = (self.gain, self.gain_axes)
        if self.drop is not None:
            parts["drop"] = (self.drop.key_data, self.drop.axes)
        return parts

    def with_parts(
        self, w: jax.Array, parts: Mapping[str, tuple[jax.Array, Sequence[int]]], **changes: Any
    ) -> LoraWeight:
        """The weight with ``w`` and the labelled arrays replaced, those of `parts`."""
        new: dict[str, Any] = {"w": w, **changes}
        for name, (array, axes) in parts.items():
            if name == "drop":
                assert self.drop is not None
                new[name] = dataclasses.replace(self.drop, key_data=array, axes=tuple(axes))
            else:
                new |= {name: array, f"{name}_axes": tuple(axes)}
        return dataclasses.replace(self, **new)

    @property
    def selects(self) -> bool:
        """Whether the factors are selected out of many."""
        return isinstance(self.a, Selected) or isinstance(self.b, Selected)

    def map_parts(
        self, w: jax.Array, fun: Callable[[Any, tuple[int, ...]], tuple[Any, Any]]
    ) -> LoraWeight:
        """The weight with ``w`` replaced and ``fun(array, labels)`` for each labelled array."""
        return self.with_parts(w, {name: fun(*part) for name, part in self.parts().items()})

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
        """``W * gain + scale * a b`` as an array of ``W``'s dtype, summed in the wider dtype."""
        return self.plus(self.delta())

    def plus(self, update: jax.Array) -> jax.Array:
        """``W * gain`` and an update, as an array of ``W``'s dtype, summed in the wider dtype."""
        wide = wider(self.w.dtype, self.a.dtype)
        if self.gain is not None:
            wide = wider(wide, self.gain.dtype)
        w = self.w.astype(wide)
        if self.gain is not None:
            w = aligned(self.gain.astype(wide), self.gain_axes, range(self.ndim)) * w
        return (w + update.astype(wide)).astype(self.w.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selected:
    """One factor out of many, by a slot that is known when the program runs.

    Attributes:
        bank: ``[slots, *stack, ...]``, the factors of all slots, which nothing moves or copies.
        slot: The slot, an int32; the number of slots stands for a factor of zeros. ``[tokens]``
            where each token selects one of its own.
        steps: Indices into the first axes of the stack, by the loops over them.
    """

    bank: jax.Array
    slot: jax.Array
    steps: tuple[jax.Array, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one factor."""
        return tuple(self.bank.shape[1 + len(self.steps) :])

    @property
    def dtype(self) -> Any:
        """The dtype of the factors."""
        return self.bank.dtype

    @property
    def exists(self) -> jax.Array:
        """Whether the slot is one of those that there are."""
        return self.slot < self.bank.shape[0]

    def at_step(self, index: jax.Array) -> Selected:
        """The factor of one layer, where the first of its axes is a stack of them."""
        return dataclasses.replace(self, steps=(*self.steps, index))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drop:
    """Dropout of the input of a weight's update.

    Attributes:
        key_data: The words of one PRNG key for each matrix of the stack; their axis is labelled
            ``RANK``.
        axes: Labels of ``key_data``'s axes (static).
        rate: The probability of an input to be dropped (static).
        impl: The name of the keys' implementation (static).
    """

    key_data: jax.Array
    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    rate: float = dataclasses.field(metadata={"static": True})
    impl: str = dataclasses.field(metadata={"static": True})

    def __call__(self, x: jax.Array, use: int) -> jax.Array:
        """``x`` with each element 0 with probability ``rate``, and divided by ``1 - rate`` else."""
        words = jnp.moveaxis(self.key_data, self.axes.index(RANK), -1)
        words = words.reshape(-1, words.shape[-1])[0]
        key = jax.random.fold_in(jax.random.wrap_key_data(words, impl=self.impl), use)
        kept = jax.random.bernoulli(key, 1 - self.rate, x.shape)
        return jnp.where(kept, x / jnp.asarray(1 - self.rate, x.dtype), jnp.zeros_like(x))


def aligned(array: jax.Array, labels: Sequence[int], axes: Sequence[int]) -> jax.Array:
    """``array`` with its axes in the order of ``axes``, and of size 1 where it has none.

    Its axis labelled ``RANK``, if there is one, has the size 1 and goes.
    """
    order = [labels.index(i) for i in axes if i in labels]
    gone = [k for k in range(len(labels)) if k not in order]
    moved = jnp.transpose(array, (*order, *gone))
    return moved.reshape([array.shape[labels.index(i)] if i in labels else 1 for i in axes])


@dataclasses.dataclass(frozen=True)
class Product:
    """An update as one product: ``a: [*stack, *in, k]``, ``b: [*stack, k, *out]``, its scale."""

    a: jax.Array
    b: jax.Array
    scale: jax.Array
    layout: Layout


def virtual_weight(w: jax.Array, factors: Product | Any, path: str) -> LoraWeight:
    """The virtual weight ``W + scale * a b`` of a parameter and what has factors and a layout."""
    layout = factors.layout
    return LoraWeight(
        w, factors.a, factors.b, factors.scale, layout.a_axes, layout.b_axes, path=path
    )
