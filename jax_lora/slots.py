"""What a bank holds for one parameter: the factors of all its slots, and those of one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.adapter import RANK, Adapter, Entry, Layout
from jax_lora.errors import AdapterError
from jax_lora.interpreter.explicit import look_up
from jax_lora.variants import DoraFactors
from jax_lora.virtual import LoraWeight, Selected

#: What a slot holds for one parameter, on the host, by the names of the arrays of `Slots`.
Arrays = dict[str, np.ndarray]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots(Entry):
    """The factors of many adapters for one parameter, padded with zeros to one rank.

    The rank stands before the features in both factors: so the last axis is a long one, for which
    vector units and the tiles of accelerators' memory are made.

    Attributes:
        a: ``[slots, *stack, rank, *in]``, trained.
        b: ``[slots, *stack, rank, *out]``, trained.
        scale: ``[slots]``.
        layout: The roles of the parameter's axes (static).
        gain: ``[slots, *stack, *out]``, what DoRA multiplies the parameter's columns by; or None.
    """

    TRAINED = frozenset({"a", "b"})

    a: jax.Array
    b: jax.Array
    scale: jax.Array
    layout: Layout = dataclasses.field(metadata={"static": True})
    gain: jax.Array | None = None

    @classmethod
    def empty(cls, slots: int, rank: int, dtype: Any, layout: Layout, gain: bool) -> Slots:
        """Slots with which the parameter is what it was."""
        one = empty_slot(rank, dtype, layout, gain)
        arrays = {name: jnp.broadcast_to(x, (slots, *x.shape)) for name, x in one.items()}
        return cls(**arrays, layout=layout)

    @property
    def count(self) -> int:
        """The number of slots."""
        return int(self.scale.shape[0])

    @property
    def rank(self) -> int:
        """The largest rank that an adapter in it can have."""
        return int(self.a.shape[1 + len(self.layout.stack_axes)])

    def axes(self) -> dict[str, tuple[int, ...]]:
        """For each array, the parameter's axis behind each axis but the first."""
        layout = self.layout
        a, b = ((*layout.stack_axes, RANK, *axes) for axes in (layout.in_axes, layout.out_axes))
        return {"a": a, "b": b, "gain": layout.column_axes}

    def blank(self) -> Arrays:
        """What a slot holds that leaves the parameter as it is."""
        return empty_slot(self.rank, self.a.dtype, self.layout, self.gain is not None)

    def problems(self) -> list[str]:
        """What is wrong with the arrays' shapes; empty if nothing is."""
        expected = {name: (self.count, *x.shape) for name, x in self.blank().items()}
        found = {name: tuple(x.shape) for name, x in self.arrays().items()}
        return [] if found == expected else [f"expected arrays of shapes {expected}, found {found}"]

    def virtual(self, w: jax.Array, path: str) -> Any:
        """None: many adapters at once make nothing of a parameter."""
        raise AdapterError(f"{path}: expected one adapter, got {self}; use `apply_bank`")

    def update(self, w: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """None: many adapters at once have no update."""
        raise AdapterError(f"expected one adapter, got {self}; take one with `bank.get`")

    def __str__(self) -> str:
        return f"{self.count} slots of rank {self.rank}"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen(Entry):
    """One of the adapters in a bank, for one parameter, chosen when the program runs.

    Attributes:
        slots: All of them.
        slot: An int32; the number of slots stands for none. ``[tokens]`` with one for each token.
    """

    slots: Slots
    slot: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return self.slots.shape

    @property
    def rank(self) -> int:
        """The largest rank that it can have."""
        return self.slots.rank

    def virtual(self, w: jax.Array, path: str) -> Any:
        """``W + scale * a b`` with factors that stay in the bank."""
        slots, axes = self.slots, self.slots.axes()

        def own(array: jax.Array, otherwise: float) -> jax.Array:
            def get(array: jax.Array, at: tuple[jax.Array, ...]) -> jax.Array:
                return array.at[at].get(mode="fill", fill_value=otherwise)

            return look_up(get, array, (self.slot,))

        weight = LoraWeight(
            w,
            Selected(slots.a, self.slot),
            Selected(slots.b, self.slot),
            own(slots.scale, 0),
            axes["a"],
            axes["b"],
            path=path,
        )
        if slots.gain is None:
            return weight
        gain = own(slots.gain, 1)[..., None]
        return dataclasses.replace(weight, gain=gain, gain_axes=(*axes["gain"], RANK))

    def update(self, w: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """None: it exists in a running program alone."""
        return self.slots.update(w)

    def problems(self) -> list[str]:
        """Those of all slots."""
        return self.slots.problems()


def empty_slot(rank: int, dtype: Any, layout: Layout, gain: bool) -> Arrays:
    """What a slot holds for a parameter that stays as it is."""
    shape, stack = layout.shape, layout.stack
    ins, outs = ([shape[i] for i in axes] for axes in (layout.in_axes, layout.out_axes))
    arrays = {
        "a": np.zeros((*stack, rank, *ins), dtype),
        "b": np.zeros((*stack, rank, *outs), dtype),
        "scale": np.zeros((), np.float32),
    }
    return arrays | ({"gain": np.ones((*stack, *outs), np.float32)} if gain else {})


def padded(factors: Arrays, slot: Arrays) -> Arrays:
    """A slot with the factors of `factors_of` in it, whose rank may be smaller."""
    for name, array in factors.items():
        slot[name][tuple(slice(n) for n in array.shape)] = array
    return slot


def obstacle(entry: Entry) -> str:
    """Why an entry has no factors to put into a slot; empty if it has."""
    if entry.WHOLE:
        return f"{entry}: what is trained whole has no factors; leave it out with `drop`"
    if isinstance(entry, DoraFactors) and entry.norm is None:
        return "DoRA without norms, which need the base; expected those of `cache_norms`"
    return ""


def ranks_of(adapter: Adapter) -> dict[str, tuple[int, Any, bool]]:
    """By path, the rank and the dtype of an entry's factors, and whether they have a gain."""
    weights = jax.eval_shape(_weights, adapter)
    return {p: (int(w.a.shape[-1]), w.a.dtype, w.gain is not None) for p, w in weights.items()}


def factors_of(adapter: Adapter) -> dict[str, Arrays]:
    """The factors of an adapter as a slot holds them, by path and on the host, of their own rank.

    Those of plain LoRA are copied; those of other variants are what a program of its own computes.
    """
    plain = {path for path, entry in adapter.items() if set(entry.arrays()) == {"a", "b", "scale"}}
    others = Adapter({path: entry for path, entry in adapter.items() if path not in plain})
    weights = _weights(others) if others else {}
    return {path: _on_host(entry, weights.get(path, entry)) for path, entry in adapter.items()}


@jax.jit
def _weights(adapter: Adapter) -> dict[str, LoraWeight]:
    # Without the parameters, of which these entries make nothing here.
    return {path: entry.virtual(None, path) for path, entry in adapter.items()}  # type: ignore[arg-type]


def _on_host(entry: Entry, factors: Any) -> Arrays:
    stacked = len(entry.layout.stack_axes)
    arrays = {
        "a": np.moveaxis(np.asarray(factors.a), -1, stacked),
        "b": np.asarray(factors.b),
        "scale": np.asarray(factors.scale),
    }
    gain = getattr(factors, "gain", None)
    return arrays if gain is None else arrays | {"gain": np.asarray(gain)[..., 0]}
