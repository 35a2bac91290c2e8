"""An adapter for each token: every row of every product is computed with its token's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_lora as jl
from tests.bank.small import NAMES, TOKENS, World, model, of_each_token
from tests.conftest import QUICK

Fun = Callable[..., Any]


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    """Of all kinds in no order, in `World.bank`'s slots; in segments for the last two examples."""
    rng = np.random.default_rng(7)
    ids = rng.choice([-1, 0, 2, 3], size=(len(NAMES), TOKENS))
    ids[-2:] = [[0, 0, 2, 2, 2], [-1, -1, -1, 3, 3]]
    return ids.astype(np.int32)


def _dense(params: Any, adapters: Any) -> dict[str, Any]:
    """Each weight with the adapter of each slot, and the base at the end, as id -1."""
    by_slot = [adapters["a"], None, adapters["b"], adapters["c"], None]
    deltas = [{} if adapter is None else jl.delta(adapter) for adapter in by_slot]
    stacks = {}
    for key_path, w in jax.tree_util.tree_leaves_with_path(params):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        stacks[path] = jnp.stack([w + delta.get(path, jnp.zeros_like(w)) for delta in deltas])
    return stacks


@pytest.fixture(scope="module")
def mixed(world: World) -> Fun:
    run = jl.apply_bank(model, token_axes=1, strict=True)

    def loss(bank: Any, ids: Any) -> Any:
        out = run(world.params, bank, ids, world.tokens)
        return sum((x**2).sum() for x in jax.tree.leaves(out)), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)


def test_every_token_is_computed_with_its_own_weights(
    world: World, ids: np.ndarray, mixed: Fun, float64: Any
) -> None:
    """Outputs and gradients, beside weights that are formed for every token in float64."""

    def loss(adapters: Any, params: Any, tokens: Any) -> Any:
        out = of_each_token(_dense(params, adapters), ids, tokens)
        return sum((x**2).sum() for x in jax.tree.leaves(out)), out

    wanted = jax.value_and_grad(loss, has_aux=True)
    (_, out64), grads64 = float64(wanted, world.adapters, world.params, world.tokens)
    bank = world.bank()
    (_, out), grads = mixed(bank, ids)
    for name, value in out64.items():
        np.testing.assert_allclose(out[name], value, rtol=0, atol=3e-6 * np.abs(value).max())
    grads = bank.with_arrays(grads)
    for name, by_path in grads64.items():
        for path, entry in grads.get(name).items():
            for part in ("a", "b"):
                value = getattr(by_path[path], part)
                atol = 1e-5 * max(np.abs(value).max(), np.abs(by_path[path].b).max())
                np.testing.assert_allclose(getattr(entry, part), value, rtol=0, atol=atol)
    # Negative control: the adapters of the neighbours.
    (_, out), _ = mixed(bank, np.roll(ids, 1, axis=1))
    assert np.abs(out["each"] - out64["each"]).max() > 0.05 * np.abs(out64["each"]).max()


#: What may be between the tokens and a product that needs to know them; ``[1, t, d]`` each.
KNOWN: dict[str, Fun] = {
    "every second": lambda x: lax.slice_in_dim(x, 0, 4, 2, axis=1),
    "the last": lambda x: x[:, -1],
    "backwards": lambda x: x[:, ::-1],
    "halves": lambda x: jnp.concatenate([x[:, :2], x[:, 2:]], axis=1),
    "in front": lambda x: jnp.moveaxis(x, 1, 0)[..., None, :],
    "flat": lambda x: x.reshape(x.shape[1:]),
    "a loop": lambda x: lax.fori_loop(0, 2, lambda _, y: y + x, x),
    "a branch": lambda x: lax.cond(x.sum() > 0, lambda x: x, lambda x: -x, x),
    "a scan over features": lambda x: jnp.moveaxis(
        lax.scan(lambda c, y: (c + y, c - y), x[..., 0], jnp.moveaxis(x, -1, 0))[1], 0, -1
    ),
    "sums so far": lambda x: jnp.cumsum(x, axis=1),
    "a neighbour beside": lambda x: x + jnp.roll(x, 1, axis=1),
    "a window": lambda x: lax.conv_general_dilated(
        jnp.moveaxis(x, 2, 1), jnp.ones((4, 4, 3)), (1,), [(2, 0)]
    ).swapaxes(1, 2),
    "attention": lambda x: jnp.einsum("bts,bsd->btd", jnp.einsum("btd,bsd->bts", x, x), x),
    "sorted features": lambda x: jnp.sort(x, axis=-1),
}


@pytest.mark.parametrize("name", KNOWN)
def test_tokens_that_are_followed(name: str, normal: Any, planned: Any) -> None:
    """A product behind it has the rows that the same function gives each adapter by itself."""
    between = KNOWN[name]

    def fun(params: Any, x: Any) -> Any:
        y = between(x @ params["u"]) @ params["v"]
        return y.reshape(1, -1, 3)

    params, x = {"u": normal(4, 4), "v": normal(4, 3)}, normal(1, 4, 4)
    # Only `v` is adapted, so that what reaches it is the same for all.
    adapters = [jl.select(planned(fun, params, x, rank=2, seed=seed), "v") for seed in (1, 2)]
    bank = jl.Bank.empty(adapters[0], 2).add("one", adapters[0]).add("two", adapters[1])
    ids = bank.ids([["one", None, "two", "two"]])
    out = jl.apply_bank(fun, token_axes=1, strict=True)(params, bank, ids, x)[0]
    each = [jl.apply(fun)(params, one, x)[0] for one in (*adapters, jl.Adapter({}))]
    rows = {"every second": [0, 2], "the last": [3], "backwards": [3, 2, 1, 0]}
    tokens = rows.get(name, [0, 1, 2, 3])
    wanted = np.stack([each[ids[0, token]][row] for row, token in enumerate(tokens)])
    np.testing.assert_allclose(out, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
    # Negative control: the rows in another order are others.
    assert np.abs(out[::-1] - wanted).max() > 0.1 or len(tokens) == 1


#: What leaves it open whose a row is, and what the error says of the row.
OPEN: dict[str, tuple[Fun, str]] = {
    "the mean": (lambda x: x.mean(1), "behind `reduce_sum`"),
    "a turn": (lambda x: jnp.roll(x, 1, axis=1), r"behind `\w+`"),
    "sorted": (lambda x: jnp.sort(x, axis=1), "behind `sort`"),
    "an order": (lambda x: x[:, jnp.argsort(x[0, :, 0])], "behind `gather`"),
    "padded": (lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 0))), "behind `pad`"),
    "mixed with features": (lambda x: x.reshape(1, 2, 8)[..., :4], "behind `reshape`"),
    "a shorter window": (
        lambda x: lax.conv_general_dilated(
            jnp.moveaxis(x, 2, 1), jnp.ones((4, 4, 2)), (1,), "VALID"
        ).swapaxes(1, 2),
        "behind `conv_general_dilated`",
    ),
    "a window ahead": (
        lambda x: lax.conv_general_dilated(
            jnp.moveaxis(x, 2, 1), jnp.ones((4, 4, 2)), (1,), [(-1, 2)]
        ).swapaxes(1, 2),
        "behind `conv_general_dilated`",
    ),
    "pairs": (lambda x: x[:, :, None] * x[:, None], "with several axes of tokens, 1, 2"),
    "positions": (lambda x: jnp.ones(x.shape), "that does not depend on the tokens"),
    "the other axis": (lambda x: jnp.swapaxes(x, 1, 2), "whose tokens it sums over"),
    "step by step": (
        lambda x: lax.scan(lambda c, y: (c, 2 * y), 0, jnp.moveaxis(x, 1, 0))[1],
        "behind `scan`",
    ),
    "a loop that turns": (
        lambda x: lax.fori_loop(0, 2, lambda _, y: jnp.flip(y, 1), x),
        "behind `loop or branch`",
    ),
    "a branch that turns": (
        lambda x: lax.cond(x.sum() > 0, lambda x: x, lambda x: jnp.flip(x, 1), x),
        "behind `loop or branch`",
    ),
}


@pytest.mark.parametrize("name", OPEN)
def test_tokens_that_are_not_known(name: str, normal: Any, planned: Any) -> None:
    between, found = OPEN[name]

    def fun(params: Any, x: Any) -> Any:
        return (between(x) @ params["w"]).reshape(1, -1, 3)

    params, x = {"w": normal(4, 3)}, normal(1, 4, 4)
    adapter = planned(fun, params, x)
    bank = jl.Bank.empty(adapter, 2).add("one", adapter)
    run = jl.apply_bank(fun, token_axes=1)
    with pytest.raises(jl.MaterializeError, match=rf"w: `dot_general` has an input.* {found}; exp"):
        run(params, bank, bank.ids([["one", None, "one", "one"]]), x)
    # One id for each example is what remains.
    jax.eval_shape(jl.apply_bank(fun), params, bank, bank.ids(["one"]), x)


def test_a_function_that_is_called_with_other_tokens(normal: Any, planned: Any) -> None:
    """JAX traces it once, so that its product has no row for one token alone."""
    dense = jax.jit(lambda x, w: x @ w)

    def fun(params: Any, x: Any) -> Any:
        return jnp.concatenate([dense(x[:, :2], params["w"]), dense(x[:, 2:], params["w"])], 1)

    params, x = {"w": normal(4, 3)}, normal(1, 4, 4)
    adapter = planned(fun, params, x)
    bank = jl.Bank.empty(adapter, 2).add("one", adapter)
    with pytest.raises(jl.MaterializeError, match="behind `jit`"):
        jl.apply_bank(fun, token_axes=1)(params, bank, bank.ids([["one", None] * 2]), x)


def test_what_only_one_adapter_can_do(normal: Any, planned: Any) -> None:
    params, x = {"w": normal(4, 3)}, normal(2, 4, 4)
    adapter = planned(lambda p, x: x @ p["w"], params, x)
    bank = jl.Bank.empty(adapter, 2).add("one", adapter)
    ids = bank.ids([["one"] * 4] * 2)
    run = jl.apply_bank(lambda p, x: x @ jnp.tanh(p["w"]), token_axes=1)
    with pytest.raises(
        jl.MaterializeError, match="w: the adapted weight reaches `tanh`; with an id"
    ):
        run(params, bank, ids, x)
    run = jl.apply_bank(lambda p, x: x @ p["w"], token_axes=1)
    for odd, expected in ((ids[:, :3], r"as many tokens as ids of an example, 3"), (ids[0], "ids")):
        with pytest.raises(jl.AdapterError, match=expected):
            run(params, bank, odd, x)
