"""A mixed batch is what each example is by itself: in values, gradients, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jax_lora as jl
from tests.bank.small import NAMES, World, model
from tests.conftest import QUICK

#: Of the largest output.
TOLERANCE = 3e-6


def _close(found: Any, wanted: Any, tol: float = TOLERANCE) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tol * np.abs(b).max())


@pytest.fixture(scope="module")
def alone(world: World, dense64: Any, float64: Any) -> list[Any]:
    """Each example by the dense model of its adapter, in float64."""
    outs = []
    for k, name in enumerate(NAMES):
        adapter = world.adapters[name] if name else jl.Adapter({})
        out = float64(model, dense64(world.params, adapter), world.tokens[k : k + 1])
        outs.append(jax.tree.map(lambda x: x[0], out))
    return outs


@pytest.fixture(scope="module")
def together(world: World, mixed: Any) -> Any:
    bank = world.bank()
    return jax.tree.map(np.asarray, mixed(world.params, bank, bank.ids(NAMES), world.tokens))


def test_a_mixed_batch_is_each_example_alone(together: Any, alone: list[Any]) -> None:
    for k, wanted in enumerate(alone):
        _close(jax.tree.map(lambda x, k=k: x[k], together), wanted)
    # Negative control: another adapter is another output.
    with pytest.raises(AssertionError):
        _close(jax.tree.map(lambda x: x[0], together), alone[1], tol=1e-2)


def test_the_order_of_the_examples_does_not_matter(world: World, mixed: Any, together: Any) -> None:
    order, bank = np.array([3, 0, 5, 1, 2, 4]), world.bank()
    ids = bank.ids(NAMES)[order]
    turned = mixed(world.params, bank, ids, world.tokens[order])
    _close(turned, jax.tree.map(lambda x: x[order], together), tol=1e-6)


def test_without_an_id_it_is_the_base_bit_for_bit(world: World) -> None:
    """Beside others too. As the plain model is compiled, with other optimisations than `QUICK`."""
    bank = world.bank()
    base = jax.jit(model)(world.params, world.tokens)
    mixed = jax.jit(jl.apply_bank(model))
    for names in ([None] * 6, NAMES):
        ids = bank.ids(names)
        found = mixed(world.params, bank, ids, world.tokens)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(base), strict=True):
            np.testing.assert_array_equal(a[ids < 0], b[ids < 0])


def test_the_same_program_serves_every_bank_and_every_id(
    world: World, mixed: Any, together: Any, compiled_programs: Callable[[], int]
) -> None:
    bank = world.bank()
    tokens = np.asarray(world.tokens)
    before = compiled_programs()
    bank = bank.add("d", world.adapters["b"]).remove("b")
    found = mixed(world.params, bank, bank.ids([n if n != "b" else "d" for n in NAMES]), tokens)
    assert compiled_programs() == before
    _close(found, together, tol=1e-6)
    # Negative control: another number of examples.
    mixed(world.params, bank, bank.ids(NAMES[:2]), tokens[:2])
    assert compiled_programs() > before


def test_gradients_reach_the_slots_that_are_used(world: World) -> None:
    """Of each what the examples with this adapter alone give; of all others zeros."""
    names = ["a", "c", None, "c", "a", "c"]
    bank = world.bank()
    ids, mixed = bank.ids(names), jl.apply_bank(model)

    def loss(bank: Any) -> Any:
        out = mixed(world.params, bank, ids, world.tokens)
        return sum((x**2).sum() for x in jax.tree.leaves(out))

    found = bank.with_arrays(jax.jit(jax.grad(loss), compiler_options=QUICK)(bank))
    for name in "ac":
        rows = [k for k, other in enumerate(names) if other == name]

        def own(adapter: Any, rows: list[int] = rows) -> Any:
            out = jl.apply(model)(world.params, adapter, world.tokens[np.array(rows)])
            return sum((x**2).sum() for x in jax.tree.leaves(out))

        wanted = jax.jit(jax.grad(own), compiler_options=QUICK)(world.adapters[name])
        for path, entry in found.get(name).items():
            for part in ("a", "b", "scale"):
                value = np.asarray(getattr(wanted[path], part))
                atol = 2e-5 * max(np.abs(value).max(), np.abs(wanted[path].b).max())
                np.testing.assert_allclose(getattr(entry, part), value, rtol=0, atol=atol)
    used = {bank.slot("a"), bank.slot("c")}
    for slots in found.entries.values():
        for array in slots.arrays().values():
            assert not np.asarray(array)[[k for k in range(5) if k not in used]].any()


def test_training_moves_the_slots_that_are_used(world: World) -> None:
    bank = world.bank()
    optimizer = jl.optim.lora_optimizer(optax.sgd(0.1))
    ids, mixed = bank.ids(["a", "a"]), jl.apply_bank(model)

    def loss(bank: Any) -> Any:
        return (mixed(world.params, bank, ids, world.tokens[:2])["each"] ** 2).sum()

    grads = jax.jit(jax.grad(loss), compiler_options=QUICK)(bank)
    updates, _ = optimizer.update(grads, optimizer.init(bank), bank)
    trained = bank.with_arrays(optax.apply_updates(bank, updates))
    for name in "bc":
        for path, entry in trained.get(name).items():
            np.testing.assert_array_equal(entry.b, world.adapters[name][path].b)
    moved = trained.get("a")["head"]
    assert np.abs(moved.b - world.adapters["a"]["head"].b).max() > 0
    np.testing.assert_array_equal(moved.scale, world.adapters["a"]["head"].scale)


@pytest.mark.parametrize("order", ["in a scan", "for each id", "rematerialised", "forwards"])
def test_derivatives_under_other_transformations(order: str, linear: tuple[Any, Any, Any]) -> None:
    """Beside the factors looked up by hand. Steps of training are a scan; gradients are mapped."""
    fun, params, x = linear
    rng = np.random.default_rng(9)
    slots = jl.Bank.empty(_plain(fun, params, x), 3, rank=2).entries["w"]
    factors = {n: jnp.asarray(rng.normal(size=getattr(slots, n).shape), jnp.float32) for n in "ab"}
    ids = np.array([[2, 0, -1, 2], [1, -1, -1, 1], [0, 0, 0, 0]])

    def ours(factors: Any, ids: Any) -> Any:
        bank = jl.Bank(jl.Adapter({"w": dataclasses.replace(slots, **factors, scale=half)}))
        return (jl.apply_bank(fun, strict=True)(params, bank, ids, x) ** 2).sum()

    def by_hand(factors: Any, ids: Any) -> Any:
        own = {n: jnp.where((ids >= 0)[:, None, None], f[ids], 0) for n, f in factors.items()}
        y = x @ params["w"] + 0.5 * jnp.einsum("eti,eri,ero->eto", x, own["a"], own["b"])
        return (y**2).sum()

    half, change = jnp.full(3, 0.5), jax.tree.map(jnp.sin, factors)

    def derivative(loss: Any) -> Any:
        def step(factors: Any, ids: Any) -> Any:
            grads = jax.grad(loss)(factors, ids)
            return jax.tree.map(lambda p, g: p - 0.01 * g, factors, grads), grads

        return {
            "in a scan": lambda: jax.lax.scan(jax.checkpoint(step), factors, ids)[1],
            "for each id": lambda: jax.vmap(jax.grad(loss), in_axes=(None, 0))(factors, ids),
            "rematerialised": lambda: jax.grad(jax.checkpoint(jax.jit(loss)))(factors, ids[0]),
            "forwards": lambda: jax.jvp(lambda f: loss(f, ids[0]), (factors,), (change,)),
        }[order]

    found, wanted = (
        jax.jit(derivative(loss), compiler_options=QUICK)() for loss in (ours, by_hand)
    )
    _close(found, wanted, 2e-5)
    assert all(np.abs(leaf).max() > 1 for leaf in jax.tree.leaves(wanted))


def test_infinite_rows_of_the_base(linear: tuple[Any, Any, Any]) -> None:
    """Zero times infinity is not zero: what no adapter is selected for has no product with one."""
    fun, _, x = linear
    params, x = {"w": jnp.ones((6, 4))}, x.at[1, 2, 3].set(jnp.inf)
    bank = jl.Bank.empty(_plain(fun, params, x), 2)
    out = jax.jit(jl.apply_bank(fun, strict=True))(params, bank, np.array([-1, -1, 0, 0]), x)
    np.testing.assert_array_equal(out[:2], (x @ params["w"])[:2])
    assert np.isinf(out[1, 2]).all()


@pytest.fixture(scope="module")
def linear() -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(3)
    params = {"w": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(4, 3, 6)), jnp.float32)
    return lambda params, x: x @ params["w"], params, x


@pytest.mark.parametrize("variant", ["lora", "lora-fa", "dora", "vera", "loha", "lokr", "pissa"])
def test_every_kind_of_adapter_beside_plain_ones(
    variant: str, linear: tuple[Any, Any, Any], filled: Any
) -> None:
    fun, params, x = linear
    settings = {"init": "pissa"} if variant == "pissa" else {"variant": variant}
    config = jl.LoraConfig(rank=2, alpha=3, targets=(jl.Rule("w", **settings),))
    plan = jl.plan(fun, params, x, config=config)
    rng = np.random.default_rng(5)
    adapter = jl.init(jax.random.key(0), params, plan)
    # Noise on what is trained, so that it is not the identity any more.
    trained = {n: v + 0.3 * rng.normal(size=v.shape) for n, v in adapter["w"].trained().items()}
    trained = {name: jnp.asarray(value, jnp.float32) for name, value in trained.items()}
    adapter = jl.Adapter({"w": dataclasses.replace(adapter["w"], **trained)})
    plain = jl.Adapter({"w": filled(_plain(fun, params, x), seed=1)["w"]})
    ready = jl.cache_norms(params, adapter)
    bank = jl.Bank.empty(ready, 3, rank=4).add("kind", ready).add("plain", plain)
    out = jl.apply_bank(fun, strict=True)(
        params, bank, bank.ids(["kind", None, "plain", "kind"]), x
    )
    wanted = [
        jl.apply(fun)(params, one, x[k]) for k, one in ((0, adapter), (2, plain), (3, adapter))
    ]
    _close(out[np.array([0, 2, 3])], jnp.stack(wanted))
    np.testing.assert_array_equal(out[1], (x @ params["w"])[1])
    assert np.abs(np.asarray(out[0] - x[0] @ params["w"])).max() > 0.1


def _plain(fun: Any, params: Any, x: Any) -> Any:
    plan = jl.plan(fun, params, x, config=jl.LoraConfig(rank=1))
    return jl.init(jax.random.key(1), params, plan)


def test_kinds_that_a_bank_does_not_hold(linear: tuple[Any, Any, Any]) -> None:
    fun, params, x = linear

    def made(rule: jl.Rule) -> jl.Adapter:
        plan = jl.plan(fun, params, x, config=jl.LoraConfig(rank=1, targets=(rule,)))
        return jl.init(jax.random.key(0), params, plan)

    dora, plain = made(jl.Rule("w", variant="dora")), made(jl.Rule("w"))
    with pytest.raises(jl.AdapterError, match=r"w: DoRA without norms.*those of `cache_norms`"):
        jl.Bank.empty(dora, 2)
    with pytest.raises(jl.AdapterError, match="w: expected no DoRA, as the bank was made like"):
        jl.Bank.empty(plain, 2).add("dora", jl.cache_norms(params, dora))
    with pytest.raises(jl.AdapterError, match=r"w: .*what is trained whole has no factors"):
        jl.Bank.empty(plain, 2).add("full", made(jl.Rule("w", variant="full")))
    bank = jl.Bank.empty(jl.cache_norms(params, dora), 2).add("plain", plain)
    with pytest.raises(jl.AdapterError, match="w: expected factors alone, got a bank with DoRA's"):
        bank.get("plain")


def test_convolutions_and_products_of_experts(normal: Any, planned: Any) -> None:
    """Experts as one batched product; their factors are looked up by expert and slot at once."""

    def fun(p: Any, x: Any) -> Any:
        x = lax.conv_general_dilated(
            x, p["conv"], (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.einsum("nhwc,eco->nheo", x, p["experts"])

    params = {"conv": normal(3, 3, 2, 4), "experts": normal(2, 4, 5)}
    x = normal(3, 4, 6, 2)
    adapters = [planned(fun, params, x, rank=rank, seed=rank) for rank in (1, 2)]
    bank = jl.Bank.empty(adapters[1], 3).add("one", adapters[0]).add("two", adapters[1])
    run = jax.jit(jl.apply_bank(fun, strict=True), compiler_options=QUICK)
    out = run(params, bank, bank.ids(["two", None, "one"]), x)
    _close(out[0], jl.apply(fun)(params, adapters[1], x[:1])[0], 2e-6)
    _close(out[2], jl.apply(fun)(params, adapters[0], x[2:])[0], 2e-6)
    _close(out[1], fun(params, x[1:2])[0], 2e-6)


def test_ragged_products_have_no_batching_rule(normal: Any, planned: Any) -> None:
    def fun(p: Any, x: Any) -> Any:
        return lax.ragged_dot(x[0], p["w"], jnp.array([2, 1]))[None]

    params, x = {"w": normal(2, 4, 5)}, normal(2, 3, 4)
    adapter = planned(fun, params, x[:1])
    bank = jl.Bank.empty(adapter, 1).add("one", adapter)
    with pytest.raises(jl.AdapterError, match=r"expected a function that jax.vmap can map over"):
        jl.apply_bank(fun)(params, bank, bank.ids(["one", None]), x)


def test_a_branch_that_depends_on_the_example(normal: Any, planned: Any) -> None:
    """Its weights are picked first: under vmap a branch would copy the bank for each example."""

    def fun(p: Any, x: Any) -> Any:
        return lax.cond(x.sum() > 0, lambda x: x @ p["w"], lambda x: x @ -p["w"] + 1, x)

    params, x = {"w": normal(6, 7)}, normal(4, 6)
    adapter = planned(fun, params, x[:1])
    bank = jl.Bank.empty(adapter, 50).add("one", adapter)
    run = jax.jit(jl.apply_bank(fun), compiler_options=QUICK)
    ids = bank.ids(["one", "one", None, "one"])
    out = run(params, bank, ids, x)
    for k in range(4):
        own = adapter if ids[k] == 0 else jl.Adapter({})
        _close(out[k], jl.apply(fun)(params, own, x[k : k + 1])[0], 2e-6)
    assert {bool(row.sum() > 0) for row in np.asarray(x)} == {True, False}
    text = run.lower(params, bank, ids, x).as_text()
    assert "tensor<50x2x6xf32>" in text  # the bank is there
    assert "tensor<4x50x" not in text


def test_strict_refuses_what_would_be_formed(linear: tuple[Any, Any, Any], filled: Any) -> None:
    _, params, x = linear
    fun = lambda params, x: x @ jnp.sin(params["w"])  # noqa: E731
    adapter = filled(_plain(lambda params, x: x @ params["w"], params, x))
    bank = jl.Bank.empty(adapter, 2).add("one", adapter)
    ids = bank.ids(["one", None, "one", None])
    with pytest.raises(jl.MaterializeError, match="w: the adapted weight reaches `sin`"):
        jl.apply_bank(fun, strict=True)(params, bank, ids, x)
    out = jl.apply_bank(fun)(params, bank, ids, x)
    _close(out[0], x[0] @ jnp.sin(jl.merge(params, adapter)["w"]))
    _close(out[1], x[1] @ jnp.sin(params["w"]))


def test_axes_shared_arguments_and_scalars(linear: tuple[Any, Any, Any], filled: Any) -> None:
    _, params, x = linear
    adapter = filled(_plain(lambda params, x: x @ params["w"], params, x))
    bank = jl.Bank.empty(adapter, 2).add("one", adapter)
    ids = bank.ids(["one", None, "one", None])

    def fun(params: Any, data: Any, shift: Any, *, power: int, nothing: Any = None) -> Any:
        y = (data["x"] @ params["w"] + shift) ** power  # [t, n, o]
        return {"y": y, "loss": y.mean(), "power": power}

    data = {"x": jnp.moveaxis(x, 0, 1), "none": None}
    shift = jnp.arange(4, dtype=jnp.float32)
    for in_axes in ((1, None), ({"x": -2, "none": None}, None), [1, None]):
        adapted = jl.apply_bank(fun, in_axes=in_axes, out_axes=1)
        out = adapted(params, bank, ids, data, shift, power=2)
        assert out["power"] == 2
        assert (out["y"].shape, out["loss"].shape) == ((3, 4, 4), (4,))
        for k in range(4):
            own = adapter if ids[k] == 0 else jl.Adapter({})
            wanted = (jl.apply(lambda p, x: x @ p["w"])(params, own, x[k]) + shift) ** 2
            _close(out["y"][:, k], wanted)
            _close(out["loss"][k], wanted.mean())


def test_arguments_that_do_not_fit(linear: tuple[Any, Any, Any]) -> None:
    fun, params, x = linear
    adapter = _plain(fun, params, x)
    bank = jl.Bank.empty(adapter, 2).add("one", adapter)
    ids, adapted = bank.ids(["one"] * 4), jl.apply_bank(fun)
    with pytest.raises(jl.AdapterError, match=r"expected a bank .*got Adapter"):
        adapted(params, adapter, ids, x)
    for odd in (ids.astype(np.float32), ids[:, None], 1):
        with pytest.raises(jl.AdapterError, match=r"expected ids as integers of shape \[batch\]"):
            adapted(params, bank, odd, x)
    with pytest.raises(jl.AdapterError, match="expected ids below 2, the number of slots"):
        adapted(params, bank, ids + 2, x)
    with pytest.raises(jl.AdapterError, match=r"as many examples as ids, 4,.*argument 0, of shape"):
        adapted(params, bank, ids, x[:3])
    with pytest.raises(jl.ConfigError, match=r"expected in_axes of argument 0, .*got 3 for"):
        jl.apply_bank(fun, in_axes=3)(params, bank, ids, x)
    with pytest.raises(jl.ConfigError, match=r"expected in_axes of argument 0, .*got '0' for"):
        jl.apply_bank(fun, in_axes="0")(params, bank, ids, x)
    with pytest.raises(jl.ConfigError, match="a tree prefix of the 1 arguments after the ids"):
        jl.apply_bank(fun, in_axes=(0, 0))(params, bank, ids, x)
    with pytest.raises(
        jl.AdapterError, match=r"outputs with the axis of the examples at out_axes=1"
    ):
        jl.apply_bank(fun, out_axes=1)(params, bank, ids, x)
    with pytest.raises(jl.AdapterError, match="w: made for shape"):
        adapted({"w": x}, bank, ids, x)


def test_under_one_more_vmap_the_bank_is_not_copied(linear: tuple[Any, Any, Any]) -> None:
    fun, params, x = linear
    adapter = _plain(fun, params, x)
    bank = jl.Bank.empty(adapter, 50).add("one", adapter)
    many = jax.jit(jax.vmap(jl.apply_bank(fun), in_axes=(None, None, 0, None)))
    ids = np.stack([bank.ids(["one"] * 4), bank.ids([None] * 4), bank.ids(["one"] * 4)])
    text = many.lower(params, bank, ids, x).as_text()
    assert "tensor<50x1x6xf32>" in text
    assert "tensor<3x50x" not in text
    _close(many(params, bank, ids, x)[1], x @ params["w"])


def test_the_signature_is_that_of_the_function() -> None:
    def fun(params: Any, x: Any, *, train: bool) -> Any:
        return x

    adapted = jl.apply_bank(fun)
    jitted = jax.jit(adapted, static_argnames="train")
    assert list(jitted.__signature__.parameters) == ["params", "bank", "ids", "x", "train"]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
def test_ids_of_a_dtype_that_cannot_count_the_slots(
    linear: tuple[Any, Any, Any], filled: Any, dtype: str
) -> None:
    """As in int32: the number of slots, 256, is 0 in eight bits."""
    fun, params, x = linear
    adapter = filled(_plain(fun, params, x))
    bank = jl.Bank.empty(adapter, 256).add("a", adapter)
    ids = np.resize([0, 1] if dtype == "uint8" else [0, -1], len(x))
    adapted = jl.apply_bank(fun)
    found, wanted = (adapted(params, bank, ids.astype(t), x) for t in (dtype, "int32"))
    np.testing.assert_array_equal(found, wanted)
    with pytest.raises(jl.AdapterError, match="ids of one example at least"):
        adapted(params, bank, ids[:0].astype(np.int32), x[:0])
