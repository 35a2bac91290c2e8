"""Products with factors that each example selects out of a bank, in the form that suits the sizes.

The walk sees one example, and `jax.vmap` runs it for all. What is a product with one factor there
is for the whole batch one of two forms:

* ``gather``: the selected factors are copied side by side, and a batched product follows.
* ``fused``: with one row for each factor, such a product is arithmetic of no weight beside the
  memory traffic. A sum of outer products, which XLA computes together with the lookup, reads every
  factor once instead of three times.

Two more lose (benchmarks/bank.py --forms): the product with the factors of all slots, of which each
example keeps its own, was measured to be faster with one row and as few as 8 slots alone, and a
ragged product of the examples sorted by slot never.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from string import ascii_letters
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero
from jax.sharding import NamedSharding

from jax_lora.interpreter.explicit import distinct, explicit_sharding, look_up, spec_of, split_as
from jax_lora.virtual import Selected, wider

#: The fused form is unrolled over the rank, up to this one, or over so many parts of the features.
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
        The product. Under `jax.vmap` over examples it has the form that suits the sizes.
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


def _apart(form: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The same as a branch, across which XLA fuses nothing; zeros where nobody selects a factor.

    On CPUs it would look factors up in the midst of what is around the product, several times over,
    or copy those of all layers at the start. Elsewhere, a branch is a wait for the host.
    """

    def branch(x: jax.Array, factor: Selected) -> jax.Array:
        out = jax.eval_shape(form, x, factor)
        nothing = lambda x, factor: jnp.zeros(out.shape, out.dtype)  # noqa: E731
        # In this order, as the second gives the result its type, of which the mesh is a part.
        return jax.lax.cond(~factor.exists.any(), nothing, form, x, factor)

    return branch


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
        """The product in the form that suits the sizes."""
        return split_as(self._sharding(x, factor), self._product, x, factor)

    def _product(self, x: jax.Array, factor: Selected) -> jax.Array:
        form = self.fused if self.fusible(x, factor) else self.gather

        @custom_vmap
        def apart(x: jax.Array, factor: Selected) -> jax.Array:
            return jax.lax.platform_dependent(x, factor, cpu=_apart(form), default=form)

        # Under one more vmap, a branch would copy the bank for each.
        apart.def_vmap(lambda size, batched, *args: _mapped(form, batched, *args))
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
        # By products of looked-up factors: of the fused form, the transpose has for each term a
        # gradient of the whole bank. What is looked up is not kept for the backward pass.
        (x, factor), (dx, d_factor) = primals, tangents
        y = self._product(x, factor)
        dy = jnp.zeros_like(y)
        if not isinstance(dx, SymbolicZero):
            dy = dy + jax.checkpoint(self.gather)(dx, factor)
        if not isinstance(d_factor.bank, SymbolicZero):
            change = dataclasses.replace(factor, bank=d_factor.bank)
            dy = dy + jax.checkpoint(self.gather)(x, change)
        return y, dy

    def fusible(self, x: Any, factor: Any) -> bool:
        """Whether each factor, whose first axis is the rank, meets one row or makes one.

        Args:
            x: The operand, or its shape.
            factor: The factor, or its shapes.
        """
        rank, features = self.factor[:1], self.factor[1:]
        sizes, rows = self._sizes(x, factor), self._rows()
        whole = any(
            {*self.x} == {*self.ids, *rows, *summed} and {*self.out} == {*self.ids, *rows, *kept}
            for summed, kept in ((rank, features), (features, rank))
        )
        return whole and math.prod(sizes[n] for n in rows) == 1 and sizes[rank] <= _MOST_TERMS

    def gather(self, x: jax.Array, factor: Selected) -> jax.Array:
        """The selected factors side by side, and a product."""
        own = _own(factor.bank, (factor.slot, *factor.steps))
        return self._einsum(f"{self.x},{self.ids}{self.factor}->{self.out}", x, own)

    def fused(self, x: jax.Array, factor: Selected) -> jax.Array:
        """A sum of outer products, which XLA computes together with the lookup, without a copy."""
        wide, sizes = wider(self.dtype, "float32"), self._sizes(x, factor)
        rank, features = self.factor[:1], self.factor[1:]
        summed, kept = (rank, features) if rank in self.x else (features, rank)
        x = jnp.transpose(x, [self.x.index(n) for n in self.ids + self._rows() + summed])
        x = x.reshape(*factor.slot.shape, -1).astype(wide)

        bank = factor.bank.reshape(*factor.bank.shape[: 2 + len(factor.steps)], -1)
        at = (jnp.where(factor.exists, factor.slot, 0), *factor.steps)

        def own(*part: Any) -> jax.Array:
            """``[*ids, ...]``: a part of the selected factors, of any one where there is none."""
            return bank.at[(*at, *part)].get(mode="promise_in_bounds").astype(wide)

        if summed == rank:
            terms = [x[..., k, None] * own(k) for k in range(sizes[rank])]
            y = sum(terms[1:], start=terms[0])
        else:
            # Sums of vectors, and in the end one along them, for which processors are not made.
            width = x.shape[-1] // max(n for n in range(1, _PARTS + 1) if x.shape[-1] % n == 0)
            parts = (slice(k, k + width) for k in range(0, x.shape[-1], width))
            terms = [x[..., None, part] * own(slice(None), part) for part in parts]
            y = sum(terms[1:], start=terms[0])
            y = jnp.matmul(y, jnp.ones(width, wide), precision="highest")
        y = jnp.where(factor.exists[..., None], y, jnp.zeros_like(y))
        letters = self.ids + self._rows() + kept
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

    def _rows(self) -> str:
        """The letters of the rows for which each factor is one."""
        return "".join(n for n in self.x if n not in self.factor + self.ids)

    def _unused(self) -> str:
        used = {*self.x, *self.ids, *self.factor, *self.out}
        return next(n for n in ascii_letters if n not in used)
