"""Products with factors that each example selects out of a bank, in the form that costs least.

The walk sees one example, and `jax.vmap` runs it for all. What is a product with one factor there
is for the whole batch one of three forms:

* ``gather``: the selected factors are copied side by side, and a batched product follows.
* ``fused``: a sum of outer products, which XLA computes together with the lookup, without a copy.
* ``all``: the product with the factors of all slots, of which each example keeps its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from string import ascii_letters
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero
from jax.sharding import NamedSharding

from jax_lora.interpreter.cost import op
from jax_lora.interpreter.explicit import distinct, explicit_sharding, look_up, spec_of, split_as
from jax_lora.virtual import Selected, wider

#: Arithmetic outside of a matrix product costs as many times that in one, on CPUs: with this value
#: the fused form is taken where benchmarks/bank.py finds it faster, for one row of each example.
_ELEMENTWISE = 25.0
#: The fused form is unrolled over the rank, or over so many parts of the features.
_MOST_TERMS, _PARTS = 64, 8


def mixed_einsum(
    x: jax.Array,
    x_letters: Sequence[str],
    factor: Selected,
    letters: Sequence[str],
    out_letters: Sequence[str],
    token: str = "",
    *,
    dtype: Any,
    **options: Any,
) -> jax.Array:
    """``einsum(x, factor -> out)`` with the factor that this example, or each token, selects.

    Args:
        x: The other operand.
        x_letters: One letter per axis of ``x``.
        factor: The factor.
        letters: One letter per axis of the factor.
        out_letters: The letters of the result.
        token: Where each token selects its own factor, the letter of their axis.
        dtype: What both operands are cast to.
        **options: Of `jax.numpy.einsum`.

    Returns:
        The product. Under `jax.vmap` over examples it has the form that costs least.
    """
    x_spec, spec, out = ("".join(part) for part in (x_letters, letters, out_letters))
    product = MixedProduct(x_spec, token, spec, out, dtype, tuple(options.items()))

    @custom_vmap
    def one(x: jax.Array, factor: Selected) -> jax.Array:
        return product.gather(x, factor)

    @one.def_vmap
    def many(size: int, batched: Any, x: jax.Array, factor: Selected) -> tuple[jax.Array, bool]:
        x_batched, of_factor = batched
        if of_factor.bank or any(of_factor.steps):  # not over examples
            return _mapped(product.gather, batched, x, factor)
        if not of_factor.slot:
            slot = jnp.broadcast_to(factor.slot, (size, *factor.slot.shape))
            factor = dataclasses.replace(factor, slot=slot)
        return product.of_examples(x_batched)(x, factor), True

    return one(x, factor)


def picked(factor: Selected) -> jax.Array:
    """The factor that this example selects, as an array."""
    return look_up(_own, factor.bank, (factor.slot, *factor.steps))


def _own(bank: jax.Array, at: tuple[jax.Array, ...]) -> jax.Array:
    return bank.at[at].get(mode="fill", fill_value=0)


def _mapped(fun: Callable[..., Any], batched: Any, *args: Any) -> tuple[Any, bool]:
    """What a rule of `custom_vmap` returns for a function without one of its own."""
    axes = jax.tree.map(lambda flag: 0 if flag else None, tuple(batched))
    return jax.vmap(fun, axes)(*args), True


@dataclasses.dataclass(frozen=True)
class MixedProduct:
    """An einsum of ``x`` with a factor for each index along some of its axes, by letters.

    Attributes:
        x: The letters of ``x``.
        ids: The letters of the axes along which each index selects a factor.
        factor: The letters of one factor.
        out: The letters of the result.
        dtype: What both operands are cast to.
        options: Of `jax.numpy.einsum`.
    """

    x: str
    ids: str
    factor: str
    out: str
    dtype: Any
    options: tuple[tuple[str, Any], ...] = ()

    def of_examples(self, x_batched: bool) -> MixedProduct:
        """The product for a batch of examples, its axis in front; ``x`` may have none."""
        e = self._unused()
        x = e + self.x if x_batched else self.x
        return dataclasses.replace(self, x=x, ids=e + self.ids, out=e + self.out)

    def __call__(self, x: jax.Array, factor: Selected) -> jax.Array:
        """The product in the form that costs least, and nothing at all where nobody selects one."""
        return split_as(self._sharding(x, factor), self._product, x, factor)

    def _product(self, x: jax.Array, factor: Selected) -> jax.Array:
        costs = self.costs(x, factor)
        best = getattr(self, min(costs, key=lambda form: costs[form]))

        # XLA fuses nothing across a branch. Otherwise it would look factors up in the midst of what
        # is around the product, several times over, or copy those of all layers at the start.
        @custom_vmap
        def apart(x: jax.Array, factor: Selected) -> jax.Array:
            out = jax.eval_shape(best, x, factor)
            used = (factor.slot < factor.bank.shape[0]).any()
            return jax.lax.cond(
                used, best, lambda x, factor: jnp.zeros(out.shape, out.dtype), x, factor
            )

        # Under one more vmap, a branch would copy the bank for each.
        apart.def_vmap(lambda size, batched, *args: _mapped(best, batched, *args))
        product = jax.custom_jvp(apart)
        product.defjvp(self._derivative, symbolic_zeros=True)
        return product(x, factor)

    def _sharding(self, x: jax.Array, factor: Selected) -> NamedSharding | None:
        """That of the result, where shardings are part of the types: as the operands are split."""
        skipped = "." * (1 + len(factor.steps))
        meshes: list[Any] = []
        names: dict[str, Any] = {}
        for letters, array in (
            (skipped + self.factor, factor.bank),
            (self.ids, factor.slot),
            (self.x, x),
        ):
            if (sharding := explicit_sharding(array)) is not None:
                meshes.append(sharding.mesh)
                names |= dict(zip(letters, spec_of(sharding, array.ndim), strict=True))
        if not meshes:
            return None
        return NamedSharding(meshes[0], distinct(names.get(n) for n in self.out))

    def _derivative(self, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        # By a form whose transposition is no more expensive: of the fused one, each term would have
        # a gradient of the whole bank. What it looks up is not kept for the backward pass.
        (x, factor), (dx, d_factor) = primals, tangents
        y = self._product(x, factor)
        dy = jnp.zeros_like(y)
        if not isinstance(dx, SymbolicZero):
            dy = dy + jax.checkpoint(self._linear)(dx, factor, factor.bank)
        if not isinstance(d_factor.bank, SymbolicZero):
            change = dataclasses.replace(factor, bank=d_factor.bank)
            dy = dy + jax.checkpoint(self._linear)(x, change, factor.bank)
        return y, dy

    def _linear(self, x: jax.Array, factor: Selected, bank: jax.Array) -> jax.Array:
        costs = self.costs(x, factor)
        if costs["gather"] <= costs["all"]:
            return self.gather(x, factor)
        return self.all(x, factor, finite=jnp.isfinite(bank[(slice(None), *factor.steps)]))

    def costs(self, x: Any, factor: Any) -> dict[str, float]:
        """What each form costs that there is, as `cost.op` counts.

        Args:
            x: The operand, or its shape and dtype.
            factor: The factor, or its shapes and dtypes.
        """
        sizes = self._sizes(x, factor)

        def count(letters: Iterable[str]) -> int:
            return math.prod(sizes[n] for n in letters)

        def cost(flops: float, elements: float) -> float:
            return op(flops, elements, jnp.dtype(self.dtype).itemsize)

        slots, one = factor.bank.shape[0], count(self.factor)
        own, outer = count(self.ids) * one, count(self.x) + count(self.out)
        flops = 2 * count({*self.x, *self.factor, *self.ids})
        small = slots * min(count(self.x), count(self.out))
        costs = {
            "gather": cost(0, 2 * own) + cost(flops, own + outer),
            "all": cost(slots * flops, slots * one + outer + small) + cost(2 * small, 2 * small),
        }
        if self._fusible(factor):
            costs["fused"] = cost(_ELEMENTWISE * flops, own + outer)
        return costs

    def _fusible(self, factor: Any) -> bool:
        """Whether it sums over a factor's first axis, the rank, and keeps the rest; or reversed."""
        summed = "".join(n for n in self.factor if n not in self.out)
        kept = "".join(n for n in self.factor if n not in self.x)
        first, rest = self.factor[:1], self.factor[1:]
        simple = (summed, kept) in ((first, rest), (rest, first)) and set(self.ids) <= set(self.x)
        return simple and factor.shape[0] <= _MOST_TERMS

    def gather(self, x: jax.Array, factor: Selected) -> jax.Array:
        """The selected factors side by side, and a product."""
        own = _own(factor.bank, (factor.slot, *factor.steps))
        return self._einsum(f"{self.x},{self.ids}{self.factor}->{self.out}", x, own)

    def all(self, x: jax.Array, factor: Selected, finite: jax.Array | None = None) -> jax.Array:
        """The product with the factors of all slots, of which each example keeps its own.

        As zero times infinity is not zero, what is not finite in one slot would reach the examples
        of all others. It is left out, and the results of that slot alone are NaN.

        Args:
            x: The operand.
            factor: The factor.
            finite: Which elements of the bank are; those that are by default.
        """
        bank = factor.bank[(slice(None), *factor.steps)]
        finite = jnp.isfinite(bank) if finite is None else finite
        bank = jnp.where(finite, bank, jnp.zeros_like(bank))
        slots, s, sizes = bank.shape[0], self._unused(), self._sizes(x, factor)
        chosen = jax.nn.one_hot(factor.slot, slots, dtype=self.dtype)
        if math.prod(sizes[n] for n in self.out) <= x.size:
            every = self._einsum(f"{self.x},{s}{self.factor}->{self.out}{s}", x, bank)
            chosen = chosen.astype(every.dtype)
            y = jnp.einsum(f"{self.out}{s},{self.ids}{s}->{self.out}", every, chosen)
        else:
            both = f"{self.ids}{''.join(n for n in self.x if n not in self.ids)}{s}"
            spread = jnp.einsum(f"{self.x},{self.ids}{s}->{both}", x.astype(self.dtype), chosen)
            y = self._einsum(f"{both},{s}{self.factor}->{self.out}", spread, bank)
        sound = finite.reshape(slots, -1).all(1).at[factor.slot].get(mode="fill", fill_value=True)
        sound = sound.reshape([sizes[n] if n in self.ids else 1 for n in self.out])
        return jnp.where(sound, y, jnp.full_like(y, jnp.nan))

    def fused(self, x: jax.Array, factor: Selected) -> jax.Array:
        """A sum of outer products, which XLA computes together with the lookup, without a copy."""
        wide, sizes = wider(self.dtype, "float32"), self._sizes(x, factor)
        first, rest = self.factor[:1], self.factor[1:]
        summed, kept = (first, rest) if first in self.x else (rest, first)
        rows = "".join(n for n in self.x if n not in self.factor + self.ids)
        x = jnp.transpose(x, [self.x.index(n) for n in self.ids + rows + summed])
        height = math.prod(sizes[n] for n in rows)
        x = x.reshape(*factor.slot.shape, height, -1).astype(wide)

        slots, features = factor.bank.shape[0], math.prod(factor.shape[1:])
        bank = factor.bank.reshape(*factor.bank.shape[: 2 + len(factor.steps)], features)
        exists = (factor.slot < slots)[..., None, None, None]
        at = (jnp.minimum(factor.slot, slots - 1), *factor.steps)

        def own(ranks: slice, part: slice) -> jax.Array:
            """``[*ids, 1, ranks, part]``: a part of the selected factors, for all rows."""
            taken = bank.at[(*at, ranks, part)].get(mode="promise_in_bounds")[..., None, :, :]
            return jnp.where(exists, taken, jnp.zeros_like(taken)).astype(wide)

        if summed == first:
            ranks = (slice(k, k + 1) for k in range(sizes[first]))
            terms = [x[..., rank] * own(rank, slice(None))[..., 0, :] for rank in ranks]
            y = sum(terms[1:], start=terms[0])
        else:
            width = features // max(n for n in range(1, _PARTS + 1) if features % n == 0)
            parts = (slice(k, k + width) for k in range(0, features, width))
            terms = [x[..., None, part] * own(slice(None), part) for part in parts]
            y = sum(terms[1:], start=terms[0]) @ jnp.ones(width, wide)
        letters = self.ids + rows + kept
        y = y.reshape([sizes[n] for n in letters])
        dtype = dict(self.options).get("preferred_element_type") or self.dtype
        return jnp.transpose(y, [letters.index(n) for n in self.out]).astype(dtype)

    def _einsum(self, spec: str, x: jax.Array, factor: jax.Array) -> jax.Array:
        return jnp.einsum(
            spec, x.astype(self.dtype), factor.astype(self.dtype), **dict(self.options)
        )

    def _sizes(self, x: Any, factor: Any) -> dict[str, int]:
        """The size of the axis that each letter is."""
        letters, shape = self.factor + self.ids + self.x, factor.shape + factor.slot.shape + x.shape
        return dict(zip(letters, shape, strict=True))

    def _unused(self) -> str:
        used = {*self.x, *self.ids, *self.factor, *self.out}
        return next(n for n in ascii_letters if n not in used)
