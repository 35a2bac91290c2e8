"""Dropout of the input of each update, with an explicit key."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.adapter import RANK, Adapter, Entry, check_key, check_plain, param_key
from jax_lora.errors import ConfigError, near_misses
from jax_lora.virtual import Drop, LoraWeight


def dropout(adapter: Adapter, key: jax.Array, rates: float | Mapping[str, float]) -> Adapter:
    """The adapter with dropout: ``x W + scale * (drop(x) a) b`` in the adapted function.

    ``drop`` sets each element of ``x`` to zero with probability ``rate``, independently, and
    divides the others by ``1 - rate``. The product with the frozen weight sees ``x`` itself. There
    is no dropout without this function: evaluate with the adapter as it is. Each weight has masks
    of its own, another one wherever the function uses it; inside a loop over anything but the
    weight's own stack they are the same in each step. Looked-up rows, and parameters trained
    whole, have none.

    Differentiate through it with respect to the adapter that goes in, as in the example.

    Args:
        adapter: The adapter.
        key: A JAX PRNG key, another one for every step.
        rates: The probability for every weight, or by path, such as ``plan.dropout``. Weights that
            are not named have none.

    Returns:
        An adapter for one call of an adapted function. The algebra and checkpoints take the
        adapter that went in.

    Raises:
        ConfigError: A rate outside [0, 1), or one for a path that is not adapted or trained whole;
            or no key.
        AdapterError: The adapter has dropout already.

    Example:
        >>> import jax, jax.numpy as jnp, jax_lora as jl
        >>> model = lambda params, x: x @ params["w"]
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
        >>> plan = jl.plan(model, params, x, config=jl.LoraConfig(rank=2, dropout=0.1))
        >>> adapter = jl.init(jax.random.key(0), params, plan)
        >>> def loss(adapter, key):
        ...     adapter = jl.dropout(adapter, key, plan.dropout)
        ...     return jl.apply(model)(params, adapter, x).sum()
        >>> jax.grad(loss)(adapter, jax.random.key(1))["w"].b.shape
        (2, 3)

    References:
        Srivastava et al. 2014, Dropout, JMLR 15(56). Hu et al. 2021, arXiv:2106.09685, whose code
        has it at this place.
    """
    check_plain(adapter)
    named = rates if isinstance(rates, Mapping) else dict.fromkeys(adapter, rates)
    unknown = [path for path in named if path not in adapter]
    if unknown:
        near = "; ".join(f"{path!r} ({near_misses(path, adapter)})" for path in unknown)
        raise ConfigError(f"expected rates for adapted parameters, got others: {near}")
    for path, rate in named.items():
        number = isinstance(rate, numbers.Real) and not isinstance(rate, bool)
        if not number or not 0 <= rate < 1:
            raise ConfigError(f"{path}: expected a rate of dropout in [0, 1), got {rate!r}")
        if isinstance(rates, Mapping) and rate > 0 and adapter[path].WHOLE:
            raise ConfigError(
                f"{path}: expected no dropout for what is trained whole, as there is no input to "
                f"drop; got the rate {rate!r}"
            )
    check_key(key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)

    def dropped(path: str, entry: Entry) -> Entry:
        rate = float(named.get(path, 0))
        if rate == 0 or entry.WHOLE:
            return entry
        stack = entry.layout.stack
        keys = jax.random.split(param_key(key, path), int(np.prod(stack, dtype=int)))
        data = jax.random.key_data(keys)
        data = data.reshape(*stack, data.shape[-1])
        return WithDropout(entry, data, rate, str(jax.random.key_impl(key)))

    return Adapter({path: dropped(path, entry) for path, entry in adapter.items()})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WithDropout(Entry):
    """An entry whose update drops some of its input.

    Attributes:
        entry: The entry.
        key_data: ``[*stack, words]``: a PRNG key for each matrix of the stack.
        rate: The probability of an input to be dropped (static).
        impl: The name of the keys' implementation (static).
    """

    LINEAR = False

    entry: Entry
    key_data: jax.Array
    rate: float = dataclasses.field(metadata={"static": True})
    impl: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return self.entry.shape

    @property
    def rank(self) -> int:
        """That of the entry."""
        return self.entry.rank

    def virtual(self, w: jax.Array, path: str) -> Any:
        """What the entry makes of ``w``, with dropout."""
        weight = self.entry.virtual(w, path)
        if not isinstance(weight, LoraWeight):
            return weight
        axes = (*self.entry.layout.stack_axes, RANK)
        return dataclasses.replace(weight, drop=Drop(self.key_data, axes, self.rate, self.impl))

    def update(self, w: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """That of the entry: dropout is not part of it."""
        return self.entry.update(w)

    def problems(self) -> list[str]:
        """Those of the entry."""
        return self.entry.problems()

    def __str__(self) -> str:
        return f"{self.entry} with dropout"
