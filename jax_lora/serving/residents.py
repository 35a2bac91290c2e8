"""Which adapters are on the device: those that were used last, as many as a bank has slots."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

import numpy as np

from jax_lora.adapter import Adapter
from jax_lora.bank import Bank


class Residents:
    """A bank whose slots are lent to whoever is asked for. One thread alone may change it.

    Attributes:
        bank: The bank.
        permanent: The names of the adapters that the bank came with, which stay.
    """

    def __init__(self, bank: Bank):
        self.bank = bank
        self.permanent = frozenset(bank.names)
        self._lent: OrderedDict[str, None] = OrderedDict()

    @property
    def lendable(self) -> int:
        """The number of slots for others than the permanent ones."""
        return self.bank.slots - len(self.permanent)

    def __contains__(self, name: str) -> bool:
        return name in self.permanent or name in self._lent

    def ids(self, names: list[str | None]) -> np.ndarray:
        """The ids of resident adapters, which are the most recently used ones now."""
        for name in names:
            if name is not None and name in self._lent:
                self._lent.move_to_end(name)
        return self.bank.ids(names)

    def lend(self, name: str, adapter: Adapter, needed: Collection[str]) -> bool:
        """Put an adapter into a slot.

        Args:
            name: Its name.
            adapter: The adapter.
            needed: The names of those that must not go for it, at most all lendable ones but one.

        Returns:
            Whether another adapter had to go.

        Raises:
            AdapterError: It does not fit. The bank is what it was.
        """
        full = len(self._lent) == self.lendable
        if full:
            oldest = next(other for other in self._lent if other not in needed)
            self.bank = self.bank.replace(oldest, adapter, rename=name)
            del self._lent[oldest]
        else:
            self.bank = self.bank.add(name, adapter)
        self._lent[name] = None
        return full
