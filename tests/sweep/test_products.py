"""Products of a shared array and a stack: the same numbers, and no stack is copied."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.sweep.products import Reordered, arranged, restored

# No two products of these are equal, so that a size says what an array is.
TRIALS, BATCH, INPUTS, RANK = 5, 3, 11, 2
QUICK = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def arrays() -> Any:
    rng = np.random.default_rng(0)
    shapes = {"x": (BATCH, INPUTS), "a": (TRIALS, INPUTS, RANK), "g": (TRIALS, BATCH, RANK)}
    return {k: jnp.asarray(rng.normal(size=shape), jnp.float32) for k, shape in shapes.items()}


def loss(a: Any, x: Any, g: Any) -> jax.Array:
    return (jnp.tanh(x @ a) * g).sum()


@pytest.mark.parametrize("how", ["plain", "jitted", "cast", "precise"])
def test_same_numbers(arrays: Any, how: str) -> None:
    """A gradient, in which the stack is an operand and what is found."""
    fun = {
        "plain": loss,
        "jitted": jax.jit(loss),
        "cast": lambda a, x, g: loss(a.astype(jnp.bfloat16).astype(jnp.float32), x, g),
        "precise": lambda a, x, g: (jnp.matmul(x, a, precision=("high", "highest")) * g).sum(),
    }[how]
    stacked = jax.vmap(jax.value_and_grad(fun), in_axes=(0, None, 0))
    arguments = arrays["a"], arrays["x"], arrays["g"]
    exchanged = Reordered(stacked, *arguments)
    if how != "cast":  # to another size of elements, and back
        assert list(exchanged.orders.values()) == [(0, 2, 1)]
    for found, expected in zip(
        jax.tree.leaves(jax.jit(exchanged)(*arguments)),
        jax.tree.leaves(jax.jit(stacked)(*arguments)),
        strict=True,
    ):
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_several_axes(arrays: Any) -> None:
    """Summed over two axes in the middle of the stack, and the others in any order."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(BATCH, 4, 3)), jnp.float32)
    a = jnp.asarray(rng.normal(size=(TRIALS, 4, 6, 3)), jnp.float32)

    def fun(a: Any, x: Any) -> jax.Array:
        return jax.lax.dot_general(x, a, (((1, 2), (1, 3)), ((), ())))

    exchanged = Reordered(fun, a, x)
    assert list(exchanged.orders.values()) == [(0, 2, 1, 3)]
    found = exchanged(a, x)
    np.testing.assert_allclose(found, np.einsum("bij,tioj->bto", x, a), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "fun",
    [
        lambda a, x: jnp.einsum("kbi,kir->kbr", jnp.broadcast_to(x, (TRIALS, *x.shape)), a),
        lambda a, x: jnp.einsum("bi,ikr->bkr", x, jnp.moveaxis(a, 0, 1)),
        lambda a, x: jnp.einsum("ki,bi->kb", a[..., 0], x),
    ],
    ids=["batched", "summed first", "matrices"],
)
def test_what_is_left_alone(arrays: Any, fun: Any) -> None:
    exchanged = Reordered(fun, arrays["a"], arrays["x"])
    assert exchanged.orders == {}
    np.testing.assert_array_equal(
        exchanged(arrays["a"], arrays["x"]), fun(arrays["a"], arrays["x"])
    )


def test_arranged_and_restored() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    tree = {"l": {"a": a, "b": np.ones(3), "n": np.ones(())}}
    paths = [path[-2:] for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    kept = arranged(tree, {paths[0]: (0, 2, 3, 1)})
    assert kept["l"]["a"].shape == (2, 4, 5, 3)
    back = restored(kept, {paths[0]: (0, 2, 3, 1)})
    assert jax.tree.all(jax.tree.map(np.array_equal, back, tree))


def stack_copies(program: Any) -> Counter[str]:
    """The operations of a compiled program that copy or transpose as much as a stack holds."""
    found: Counter[str] = Counter()
    pattern = r"= f32\[([\d,]+)\]\S* (copy|transpose)\("
    for dims, op in re.findall(pattern, program.as_text()):
        if np.prod([int(n) for n in dims.split(",")]) == TRIALS * INPUTS * RANK:
            found[op] += 1
    return found


def test_no_stack_is_copied_in_a_step(arrays: Any) -> None:
    """Counted in the compiled program of one step of descent on the stack as it is kept."""
    step = jax.vmap(lambda a, x, g: a - 0.1 * jax.grad(loss)(a, x, g), in_axes=(0, None, 0))
    a, x, g = arrays["a"], arrays["x"], arrays["g"]
    exchanged = Reordered(step, a, x, g)
    order = next(iter(exchanged.orders.values()))

    def kept(a: Any, x: Any, g: Any) -> jax.Array:
        back = [order.index(axis) for axis in range(3)]
        return jnp.transpose(exchanged(jnp.transpose(a, back), x, g), order)

    def compiled(fun: Any, a: Any) -> Any:
        return jax.jit(fun).lower(a, x, g).compile()

    assert stack_copies(compiled(kept, jnp.transpose(a, order))) == {}
    # Negative control: as `jax.vmap` has it.
    assert stack_copies(compiled(step, a)).total() > 0
