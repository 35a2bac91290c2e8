"""Products with factors out of a bank: both forms, what each reads and copies, what stays out."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.interpreter.mixed import MixedProduct, mixed_einsum
from jax_lora.virtual import Selected
from tests.conftest import QUICK

#: By what they are: letters of ``x``, of one factor and of the result, and sizes of each letter.
PRODUCTS = {
    "to the rank": ("ti", "ri", "tr", {"t": 1, "i": 12, "r": 3}),
    "from the rank": ("tr", "ro", "to", {"t": 1, "r": 3, "o": 7}),
    "out of several axes": ("tij", "rij", "tr", {"t": 1, "i": 3, "j": 4, "r": 2}),
    "into several axes": ("tr", "roj", "ojt", {"t": 1, "r": 3, "o": 5, "j": 2}),
    "no rows": ("i", "ri", "r", {"i": 11, "r": 3}),
    "several rows": ("ti", "ri", "tr", {"t": 4, "i": 12, "r": 3}),
    "a stack": ("eti", "eri", "etr", {"e": 2, "t": 1, "i": 6, "r": 3}),
}
ONE_ROW = ("to the rank", "from the rank", "out of several axes", "into several axes", "no rows")
SLOTS, IDS = 4, (2, 0, 4, 2, 3)  # slot 4 is none


def _case(name: str, normal: Any, slots: int = SLOTS) -> tuple[MixedProduct, Any, Selected]:
    x, factor, out, sizes = PRODUCTS[name]
    shapes = {letters: [sizes[n] for n in letters] for letters in (x, factor)}
    product = MixedProduct("e" + x, "e", factor, "e" + out, "float32")
    if "e" in x:
        product = MixedProduct("b" + x, "b", factor, "b" + out, "float32")
    bank = Selected(normal(slots, *shapes[factor]), jnp.asarray(IDS, jnp.int32))
    return product, normal(len(IDS), *shapes[x]), bank


def _wanted(product: MixedProduct, x: Any, factor: Selected) -> np.ndarray:
    bank = np.asarray(factor.bank, np.float64)
    own = np.concatenate([bank, np.zeros_like(bank[:1])])[np.asarray(factor.slot)]
    spec = f"{product.x},{product.ids}{product.factor}->{product.out}"
    return np.einsum(spec, np.asarray(x, np.float64), own)


@pytest.mark.parametrize("name", PRODUCTS)
def test_both_forms_are_the_product(name: str, normal: Any) -> None:
    product, x, factor = _case(name, normal)
    wanted = _wanted(product, x, factor)
    assert product.fusible(x, factor) == (name in ONE_ROW)
    forms = [product, product.gather] + [product.fused] * (name in ONE_ROW)
    for form in forms:
        np.testing.assert_allclose(form(x, factor), wanted, rtol=0, atol=2e-6)
    assert np.abs(wanted).max() > 0.5


def test_in_one_dtype_or_a_wider_one(normal: Any) -> None:
    """Sums are in float32 at least, also where factors and operands are bfloat16."""
    product, x, factor = _case("to the rank", normal)
    wanted = _wanted(product, x, factor)
    half = MixedProduct(product.x, product.ids, product.factor, product.out, "bfloat16")
    narrow = Selected(factor.bank.astype("bfloat16"), factor.slot)
    for form in (half, half.gather):
        out = form(x.astype("bfloat16"), narrow)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(out, np.float64), wanted, rtol=0, atol=0.05)
    options = (("preferred_element_type", "float32"),)
    wide = MixedProduct(product.x, product.ids, product.factor, product.out, "bfloat16", options)
    assert wide(x.astype("bfloat16"), narrow).dtype == jnp.float32


@pytest.mark.parametrize("name", ["to the rank", "from the rank", "several rows"])
def test_what_is_not_finite_stays_in_its_slot(name: str, normal: Any) -> None:
    product, x, factor = _case(name, normal)
    wanted = _wanted(product, x, factor)
    bank = factor.bank.at[0].set(jnp.nan).at[2, 0].set(jnp.inf)  # slot 0 is what is in front
    for form in (product, product.gather):
        out = np.asarray(form(x, Selected(bank, factor.slot)))
        for k in (2, 4):  # none, and slot 3
            np.testing.assert_allclose(out[k], wanted[k], rtol=0, atol=2e-6)
        assert not out[2].any()
        assert not np.isfinite(out[1]).any()


@pytest.fixture(scope="module")
def copies() -> Callable[..., bool]:
    """Whether a compiled program has room for a copy of every example's factor, on the CPU."""

    def check(product: MixedProduct, x: Any, factor: Selected) -> bool:
        memory = jax.jit(product).lower(x, factor).compile().memory_analysis()
        own = factor.bank[0].nbytes * len(factor.slot)
        return bool(memory.temp_size_in_bytes > 0.9 * own)

    return check


@pytest.mark.parametrize("rank", [4, 32])
@pytest.mark.parametrize("direction", ["to", "from"])
def test_of_one_row_nothing_is_copied(
    rank: int, direction: str, normal: Any, copies: Callable[..., bool]
) -> None:
    """Of larger sizes, so that what else a program needs does not matter."""
    ids = jnp.arange(16, dtype=jnp.int32)
    factor = Selected(normal(20, rank, 256), ids)
    letters = ("eti", "etr") if direction == "to" else ("etr", "eti")
    product = MixedProduct(letters[0], "e", "ri", letters[1], "float32")
    shape = {"i": 256, "r": rank}[letters[0][-1]]
    assert not copies(product, normal(16, 1, shape), factor)
    # Negative control: of several rows.
    assert copies(product, normal(16, 4, shape), factor)


def test_a_long_sum_is_not_unrolled(normal: Any) -> None:
    product = MixedProduct("er", "e", "ri", "ei", "float32")
    for rank, fused in ((64, True), (65, False)):
        factor = jax.eval_shape(lambda r=rank: Selected(jnp.zeros((2, r, 3)), jnp.zeros(5, int)))
        assert product.fusible(jax.ShapeDtypeStruct((5, rank), "float32"), factor) == fused


def test_where_nobody_selects_anything_nothing_is_read(normal: Any) -> None:
    """On CPUs; a branch would make other processors wait for the host."""
    product, x, factor = _case("several rows", normal)
    lowered = jax.jit(product).trace(x, factor)
    cpu, gpu = (lowered.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda"))
    assert ("stablehlo.or" in cpu, "stablehlo.or" in gpu) == (True, False)  # whether any id is one


def test_derivatives_are_those_of_the_plain_product(normal: Any) -> None:
    """Of both operands, forwards and backwards, and of what is selected twice."""
    for name in ("to the rank", "from the rank", "several rows"):
        product, x, factor = _case(name, normal)

        def plain(x: Any, bank: Any, product: Any = product, slot: Any = factor.slot) -> Any:
            own = jnp.concatenate([bank, jnp.zeros_like(bank[:1])])[slot]
            return jnp.einsum(f"{product.x},{product.ids}{product.factor}->{product.out}", x, own)

        def ours(x: Any, bank: Any, product: Any = product, slot: Any = factor.slot) -> Any:
            return product(x, Selected(bank, slot))

        changes = (normal(*x.shape), normal(*factor.bank.shape))
        for one, other in zip(
            *(_derivatives(f, (x, factor.bank), changes) for f in (ours, plain)), strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def _derivatives(fun: Any, args: Any, changes: Any) -> list[Any]:
    def run(args: Any, changes: Any) -> Any:
        y, dy = jax.jvp(fun, args, changes)
        _, back = jax.vjp(fun, *args)
        only_bank = jax.grad(lambda bank: (fun(args[0], bank) ** 2).sum())(args[1])
        return [dy, *back(y), only_bank]

    return jax.jit(run, compiler_options=QUICK)(args, changes)


def test_the_gradient_keeps_no_copies(normal: Any) -> None:
    """What was looked up is looked up again: nothing of its size waits for the backward pass."""
    bank, ids = normal(20, 4, 64), jnp.arange(16, dtype=jnp.int32)
    product = MixedProduct("eti", "e", "ri", "etr", "float32")

    def loss(bank: Any, x: Any) -> Any:
        return jnp.sin(product(x, Selected(bank, ids))).sum()

    x = normal(16, 3, 64)
    _, pull = jax.vjp(loss, bank, x)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pull) if hasattr(leaf, "nbytes"))
    assert kept < bank.nbytes + 3 * x.nbytes


def test_the_bank_is_not_copied_for_examples(normal: Any) -> None:
    """Under the walk's vmap: what each example selects is looked up in the bank that all share."""
    bank, ids = normal(50, 3, 8), jnp.asarray([1, 2, 50])

    def one(x: Any, slot: Any) -> Any:
        return mixed_einsum(x, "ti", Selected(bank, slot), "ri", "tr", dtype="float32")

    x = normal(3, 2, 8)
    out = jax.jit(jax.vmap(one))(x, ids)
    np.testing.assert_allclose(out[0], x[0] @ bank[1].T, rtol=0, atol=1e-5)
    text = jax.jit(jax.vmap(one)).lower(x, ids).as_text()
    assert re.search(r"tensor<3x3x8xf32>", text)  # the factors of three
    assert "tensor<3x50x" not in text
