"""Many adapters side by side on the device, by name, added and removed without compiling."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.adapter import Adapter, check_plain
from jax_lora.errors import AdapterError, ConfigError, expect_type, near_misses
from jax_lora.lowrank import check_rank
from jax_lora.sharding import adapter_shardings
from jax_lora.slots import Arrays, Slots, factors_of, obstacle, padded, ranks_of
from jax_lora.tables import count
from jax_lora.variants import DoraFactors, LoraFactors


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an adapter is.

    Attributes:
        slot: Its slot.
        ranks: The rank of each of its entries, by path.
    """

    slot: int
    ranks: dict[str, int]


@jax.tree_util.register_pytree_with_keys_class
class Bank:
    """Adapters of one model, of different ranks and scales, in a fixed number of slots.

    A bank is a value and a pytree: per parameter, the factors of all slots in one array, padded
    with zeros to one rank. `add`, `replace` and `remove` write one slot of it, in the time that
    copying one adapter takes, and compile nothing. They return a new bank, and the old one is gone:
    its memory is the new one's.

    The names belong to the host. They are no part of the pytree, so that a program compiled for a
    bank serves every other one; what comes out of a transformed function has arrays alone, and
    `with_arrays` gives them to the bank that has the names.

    Attributes:
        entries: The arrays of all slots, by the parameter's path.

    Example:
        >>> import jax.numpy as jnp, jax_lora as jl
        >>> model = lambda params, x: x @ params["w"]
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
        >>> plan = jl.plan(model, params, x, config=jl.LoraConfig(rank=2))
        >>> french = jl.init(jax.random.key(0), params, plan)
        >>> bank = jl.Bank.empty(french, slots=8).add("french", french)
        >>> bank
        Bank(1 of 8 slots, rank 2, 1 parameter, 480 bytes)
        >>> adapted = jax.jit(jl.apply_bank(model))
        >>> adapted(params, bank, bank.ids(["french", None]), x).shape  # None: the plain base
        (2, 3)
    """

    __slots__ = ("_places", "entries")

    def __init__(self, entries: Adapter, places: Mapping[str, _Place] | None = None):
        self.entries = entries
        self._places = places

    @classmethod
    def empty(
        cls,
        like: Adapter,
        slots: int,
        *,
        rank: int | Mapping[str, int] | None = None,
        dtype: Any = None,
    ) -> Bank:
        """A bank without adapters.

        Args:
            like: An adapter, or its shapes, as of ``jax.eval_shape``: what can be put into the bank
                adapts no other parameters than this one, in the same layout. If it has DoRA
                somewhere, there is room for that.
            slots: How many adapters there is room for.
            rank: The largest rank of an adapter, for all parameters or by path; that of ``like`` by
                default. A variant counts with the rank of its update as a product: LoHa's is the
                square of its own.
            dtype: Of the factors; that of ``like`` by default.

        Returns:
            The bank, on the default device.

        Raises:
            AdapterError: An entry of ``like`` has no factors.
            ConfigError: Fewer than one slot, a rank below one, or one for a path that is not there;
                a dtype that is none of floating-point numbers.
        """
        check_plain(like)
        if not like:
            raise AdapterError("expected an adapter of one parameter at least, got an empty one")
        if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
            raise ConfigError(f"expected a dtype of floating-point numbers, got dtype={dtype!r}")
        if isinstance(slots, bool) or not isinstance(slots, (int, np.integer)) or slots < 1:
            raise ConfigError(f"expected at least one slot, got slots={slots!r}")
        _refuse(f"{path}: {o}" for path, entry in like.items() if (o := obstacle(entry)))
        given = rank if isinstance(rank, Mapping) else dict.fromkeys(like, rank)
        for path, largest in given.items():
            if path not in like:
                near = near_misses(path, like)
                raise ConfigError(f"expected ranks of adapted parameters, got {path!r} ({near})")
            if largest is not None:
                check_rank(largest)
        entries = {}
        for path, (own, of_factors, gain) in ranks_of(like).items():
            largest, layout = given.get(path) or own, like[path].layout
            entries[path] = Slots.empty(slots, largest, dtype or of_factors, layout, gain)
        bank = cls(Adapter(entries), {})
        return bank._written(0, bank._blank(), {})  # so that no later write compiles anything

    @property
    def slots(self) -> int:
        """The number of slots."""
        return int(jax.tree.leaves(self.entries)[0].shape[0])

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters in it."""
        return tuple(self._named())

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays."""
        return self.entries.nbytes

    def __contains__(self, name: object) -> bool:
        return name in self._named()

    def __len__(self) -> int:
        return len(self._named())

    def __repr__(self) -> str:
        if not all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(self)):
            return f"Bank({self.entries!r})"
        ranks = sorted({entry.rank for entry in self.entries.values()})
        rank = "-".join(str(r) for r in dict.fromkeys((ranks[0], ranks[-1])))
        used = "arrays of" if self._places is None else f"{len(self)} of"
        parameters = f"{len(self.entries)} parameter{'s' * (len(self.entries) > 1)}"
        size = count(self.nbytes)
        return f"Bank({used} {self.slots} slots, rank {rank}, {parameters}, {size} bytes)"

    def slot(self, name: str) -> int:
        """The slot of an adapter.

        Raises:
            AdapterError: There is none of this name, with the nearest names.
        """
        return self._place(name).slot

    def ids(self, names: str | Sequence[Any] | None) -> np.ndarray:
        """The ids of adapters by their names, for `apply_bank`.

        Args:
            names: One name, or names in sequences, nested as the ids shall be; None is the plain
                base.

        Returns:
            An int32 array of the names' shape.

        Raises:
            AdapterError: There is no adapter of a name, with the nearest names; what is no name; or
                sequences of different lengths.
        """
        if names is None or isinstance(names, str):
            return np.asarray(-1 if names is None else self.slot(names), np.int32)
        if not isinstance(names, (Sequence, np.ndarray)) or isinstance(names, bytes):
            raise AdapterError(f"expected names, None, or sequences of these; got {names!r}")
        found = [self.ids(name) for name in names]
        shapes = sorted({ids.shape for ids in found})
        if len(shapes) > 1:
            raise AdapterError(f"expected names in sequences of one length, got shapes {shapes}")
        return np.asarray(found, np.int32)

    def add(self, name: str, adapter: Adapter) -> Bank:
        """The bank with one adapter more, in a slot that was free.

        Args:
            name: Its name.
            adapter: The adapter. Parameters of the bank that it does not adapt stay as they are.

        Returns:
            The new bank, in the memory of this one.

        Raises:
            AdapterError: There is an adapter of this name, or no free slot; or the adapter does not
                fit, with every reason. The bank is still what it was.
        """
        self._check_new(name)
        free = set(range(self.slots)) - {place.slot for place in self._named().values()}
        if not free:
            raise AdapterError(f"expected a free slot, but all {self.slots} are taken; remove one")
        return self._put(name, min(free), adapter)

    def replace(self, name: str, adapter: Adapter, *, rename: str | None = None) -> Bank:
        """The bank with another adapter in the place of the one of this name.

        Args:
            name: The name.
            adapter: The new adapter.
            rename: The new adapter's name, if it has another one.

        Returns:
            The new bank, in the memory of this one.

        Raises:
            AdapterError: There is no adapter of this name, with the nearest names; or there is one
                of the new name; or the new one does not fit, with every reason. The bank is still
                what it was.
        """
        slot = self._place(name).slot
        if rename is None or rename == name:
            return self._put(name, slot, adapter)
        self._check_new(rename)
        return self._put(rename, slot, adapter, gone=name)

    def remove(self, name: str) -> Bank:
        """The bank without an adapter; its slot is free, and its id stands for the plain base.

        Raises:
            AdapterError: There is no adapter of this name, with the nearest names.
        """
        slot = self._place(name).slot
        return self._written(slot, self._blank(), self._places_without(name))

    def get(self, name: str) -> Adapter:
        """An adapter out of the bank, of the rank it had: to be saved after training, say.

        Raises:
            AdapterError: There is no adapter of this name, with the nearest names; or it has DoRA,
                of which the bank keeps the product alone.
        """
        place = self._place(name)
        entries = {}
        for path, rank in place.ranks.items():
            slots = self.entries[path]
            if slots.gain is not None:
                raise AdapterError(f"{path}: expected factors alone, got a bank with DoRA's norms")
            one, layout = _read(slots, place.slot), slots.layout
            along = len(layout.stack_axes)
            a = jnp.moveaxis(one["a"], along, -1)[..., :rank]
            b = jax.lax.slice_in_dim(one["b"], 0, rank, axis=along)
            entries[path] = LoraFactors(a, b, one["scale"], layout)
        return Adapter(entries)

    def with_arrays(self, bank: Bank) -> Bank:
        """The names of this bank with the arrays of another: one after a step of training, say.

        Raises:
            AdapterError: The other bank has other arrays than this one.
        """
        expect_type("a bank", bank, Bank)
        if _shapes(self) != _shapes(bank):
            raise AdapterError(f"expected the arrays of {self!r}, got others, {bank!r}")
        return Bank(bank.entries, self._named())

    def shardings(self, params: Any) -> Bank:
        """Where its arrays belong: split as the parameters are, with all slots on every device.

        Args:
            params: The parameters, or their shardings, as for `adapter_shardings`.

        Returns:
            A bank with a sharding in the place of every array.
        """
        return Bank(adapter_shardings(self.entries, params), self._places)

    def tree_flatten_with_keys(self) -> tuple[Any, None]:
        """For JAX: the arrays, without the names."""
        return [(jax.tree_util.GetAttrKey("entries"), self.entries)], None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> Bank:
        """For JAX: the bank with other arrays, which has no names."""
        (entries,) = children
        return cls(entries)

    def _named(self) -> Mapping[str, _Place]:
        if self._places is None:
            raise AdapterError(
                "expected a bank with names, got one out of a transformed function, which has "
                "arrays alone; use bank.with_arrays(...) of the bank that went in"
            )
        return self._places

    def _place(self, name: str) -> _Place:
        places = self._named()
        if name not in places:
            raise AdapterError(
                f"no adapter {name!r} in the bank ({near_misses(str(name), places)})"
            )
        return places[name]

    def _places_without(self, name: str | None) -> dict[str, _Place]:
        return {other: place for other, place in self._named().items() if other != name}

    def _check_new(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise AdapterError(f"expected a name, a string that is not empty; got {name!r}")
        if name in self._named():
            raise AdapterError(f"expected a new name, but {name!r} is in the bank; use replace")

    def _put(self, name: str, slot: int, adapter: Adapter, gone: str | None = None) -> Bank:
        check_plain(adapter)
        _refuse(
            f"{path}: {p}" for path, entry in adapter.items() if (p := self._problem(path, entry))
        )
        factors = factors_of(adapter)
        ranks = {path: _rank(adapter[path], arrays) for path, arrays in factors.items()}
        _refuse(
            f"{path}: expected rank {self.entries[path].rank} at most, got {rank}"
            for path, rank in ranks.items()
            if rank > self.entries[path].rank
        )
        arrays = self._blank()
        for path, own in factors.items():
            padded(own, arrays[path])
        places = self._places_without(gone) | {name: _Place(slot, ranks)}
        return self._written(slot, arrays, places)

    def _problem(self, path: str, entry: Any) -> str:
        """Why an entry cannot be put into the bank, whatever its rank; empty if it can."""
        if path not in self.entries:
            return f"not a parameter of the bank ({near_misses(path, self.entries)})"
        slots = self.entries[path]
        if reason := obstacle(entry) or "; ".join(entry.problems()):
            return reason
        if entry.layout != slots.layout:
            return f"expected {slots.layout}, got {entry.layout}"
        if isinstance(entry, DoraFactors) and slots.gain is None:
            return "expected no DoRA, as the bank was made like an adapter without; got some"
        return ""

    def _blank(self) -> dict[str, Arrays]:
        return {path: self.entries[path].blank() for path in self.entries}

    def _written(self, slot: int, arrays: Any, places: Mapping[str, _Place]) -> Bank:
        if any(_is_gone(leaf) for leaf in jax.tree.leaves(self)):
            raise AdapterError(
                "expected the newest bank, got one whose memory a later one has; go on with what "
                "add, replace and remove return"
            )
        return Bank(_write(self.entries, np.int32(slot), arrays), places)


@functools.partial(jax.jit, donate_argnums=0)
def _write(entries: Adapter, slot: jax.Array, arrays: dict[str, Arrays]) -> Adapter:
    def written(slots: Slots, own: Arrays) -> Slots:
        new = {name: array.at[slot].set(own[name]) for name, array in slots.arrays().items()}
        return dataclasses.replace(slots, **new)

    return Adapter({path: written(entries[path], arrays[path]) for path in entries})


@jax.jit
def _read(slots: Slots, slot: jax.Array) -> dict[str, jax.Array]:
    return {name: array[slot] for name, array in slots.arrays().items()}


def _rank(entry: Any, arrays: Arrays) -> int:
    return int(arrays["a"].shape[len(entry.layout.stack_axes)])


def _is_gone(leaf: Any) -> bool:
    return (
        isinstance(leaf, jax.Array)
        and not isinstance(leaf, jax.core.Tracer)
        and bool(leaf.is_deleted())
    )


def _shapes(bank: Bank) -> Any:
    leaves, structure = jax.tree.flatten(bank)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _refuse(problems: Iterable[str]) -> None:
    found = list(problems)
    if found:
        raise AdapterError("the adapter does not fit the bank:\n  " + "\n  ".join(found))
