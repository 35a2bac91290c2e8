"""Only `a` and `b` move, nothing else has state, and no gradient of a frozen weight is computed."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_lora as jl
from jax_lora.models import MLP
from jax_lora.optim import (
    FASTER,
    FROZEN,
    TRAINED,
    labels,
    lora_optimizer,
    lora_plus,
    lora_plus_labels,
)
from jax_lora.training import Batch, TrainState, train_step
from jax_lora.variants import VARIANTS

# The article's network. The batch of 16 is a size that no weight or factor has.
SIZES = ((3072, 128), (128, 128), (128, 10))
RANK, BATCH = 32, 16
FACTORS = sum(RANK * (n_in + n_out) for n_in, n_out in SIZES)
MODEL = MLP(tuple(n_out for _, n_out in SIZES))
ADAPTED = jl.apply(MODEL.apply)


@pytest.fixture(scope="module")
def params() -> Any:
    return jax.jit(MODEL.init)(jax.random.key(0), jnp.ones((1, 3072)))


@pytest.fixture(scope="module")
def adapter(params: Any) -> jl.Adapter:
    """An adapter in the middle of training: `b` is not zero, so every gradient is nonzero."""
    config = jl.LoraConfig(rank=RANK, alpha=0.5, scaling="alpha", targets="**/kernel")
    x = jax.ShapeDtypeStruct((BATCH, 3072), jnp.float32)
    fresh = jl.init(jax.random.key(1), params, jl.plan(MODEL.apply, params, x, config=config))
    noise = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: leaf + noise.normal(0, 0.02, leaf.shape).astype(np.float32), fresh
    )


@pytest.fixture(scope="module")
def batch() -> Batch:
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (BATCH, 3072)).astype(np.float32)
    labels = rng.integers(0, 10, BATCH, np.int32)
    return Batch((jnp.asarray(images), jnp.asarray(labels)), jnp.ones(BATCH))


def loss_of_adapter(adapter: Any, params: Any, data: Any) -> jax.Array:
    images, classes = data
    return optax.softmax_cross_entropy_with_integer_labels(
        ADAPTED(params, adapter, images), classes
    )


def loss_of_both(both: Any, frozen: None, data: Any) -> jax.Array:
    return loss_of_adapter(both["lora"], both["base"], data)


def sgd() -> optax.GradientTransformation:
    return optax.sgd(0.01, momentum=0.9)


def run(
    loss: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation,
    trained: Any,
    frozen: Any,
    batch: Batch,
    steps: int = 3,
) -> Any:
    """What is trained, after some steps on the same batch."""
    state = TrainState.create(trained, optimizer, frozen)
    step = jax.jit(train_step(loss, optimizer))
    # Adam's bias correction and MultiSteps, in optax, mix float32 with int32 counters.
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(steps):
            state, _ = step(state, batch)
    return state.trained


def moved(before: Any, after: Any) -> dict[str, bool]:
    """Whether each leaf changed in any bit, by its path."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    return {
        jax.tree_util.keystr(path): np.asarray(old).tobytes() != np.asarray(new).tobytes()
        for (path, old), new in pairs
    }


class TestLabels:
    def test_of_an_adapter(self, adapter: jl.Adapter) -> None:
        tree = labels(adapter)
        assert isinstance(tree, jl.Adapter)
        assert list(tree) == list(adapter)
        for factors in tree.values():
            assert (factors.a, factors.b, factors.scale) == (TRAINED, TRAINED, FROZEN)

    def test_of_a_tree_that_holds_adapters(self, params: Any, adapter: jl.Adapter) -> None:
        tree = {"base": params, "lora": [adapter, {"other": adapter}]}
        found = labels(tree)
        assert jax.tree.structure(found) == jax.tree.structure(tree)
        counts = Counter(jax.tree.leaves(found))
        # Two factors and a scale for each of three layers of each adapter; six leaves of the base.
        assert counts == {TRAINED: 2 * 6, FROZEN: 2 * 3 + 6}
        assert set(jax.tree.leaves(found["base"])) == {FROZEN}

    def test_a_tree_without_an_adapter_is_refused(self) -> None:
        with pytest.raises(jl.AdapterError, match="got dict: there is nothing to train"):
            labels({"a": jnp.ones(2), "b": jnp.ones(2)})


class TestWhatMoves:
    @pytest.mark.parametrize(
        "inner",
        [
            sgd(),
            optax.adamw(0.01, weight_decay=0.1),
            optax.MultiSteps(
                optax.chain(optax.clip_by_global_norm(0.1), sgd()), every_k_schedule=2
            ).gradient_transformation(),
        ],
        ids=["sgd", "adamw", "clipped-accumulated"],
    )
    def test_only_a_and_b_and_as_they_do_without_the_base(
        self, params: Any, adapter: jl.Adapter, batch: Batch, inner: optax.GradientTransformation
    ) -> None:
        both = {"base": params, "lora": adapter}
        after = run(loss_of_both, lora_optimizer(inner), both, None, batch)
        for path, changed in moved(both, after).items():
            assert changed == path.endswith((".a", ".b")), path

        alone = run(loss_of_adapter, lora_optimizer(inner), adapter, params, batch)
        assert not any(c for path, c in moved(adapter, alone).items() if path.endswith(".scale"))
        # The same operations, which XLA may fuse differently: float32 rounding over three steps,
        # which Adam's division by the root of tiny squares magnifies.
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
            alone,
            after["lora"],
        )

    def test_without_the_labels_everything_moves(
        self, params: Any, adapter: jl.Adapter, batch: Batch
    ) -> None:
        """The control: every frozen leaf has a gradient, and only the labels hold it back."""
        both = {"base": params, "lora": adapter}
        assert all(moved(both, run(loss_of_both, sgd(), both, None, batch)).values())

    def test_masked_alone_would_let_raw_gradients_through(
        self, params: Any, adapter: jl.Adapter, batch: Batch
    ) -> None:
        """Why it is `multi_transform`: `optax.masked` passes on what it does not transform."""
        both = {"base": params, "lora": adapter}
        optimizer = optax.masked(sgd(), lambda t: jax.tree.map(lambda x: x == TRAINED, labels(t)))
        after = moved(both, run(loss_of_both, optimizer, both, None, batch))
        assert any(changed for path, changed in after.items() if "base" in path)


class TestState:
    @pytest.mark.parametrize("beside_the_base", [False, True])
    @pytest.mark.parametrize(
        ("inner", "moments", "counters"),
        [(sgd(), 1, 0), (optax.adam(1e-3), 2, 1), (optax.sgd(1e-3), 0, 0)],
        ids=["momentum", "adam", "plain"],
    )
    def test_is_the_factors_and_nothing_else(
        self,
        params: Any,
        adapter: jl.Adapter,
        inner: optax.GradientTransformation,
        moments: int,
        counters: int,
        beside_the_base: bool,
    ) -> None:
        trained = {"base": params, "lora": adapter} if beside_the_base else adapter
        arrays = jax.tree.leaves(lora_optimizer(inner).init(trained))
        assert sum(array.size for array in arrays) == moments * FACTORS + counters
        assert sum(array.nbytes for array in arrays) == 4 * (moments * FACTORS + counters)
        assert FACTORS == adapter.trainable_params == 115_008

    def test_clipping_and_accumulation_outside_hold_state_for_the_base(
        self, params: Any, adapter: jl.Adapter
    ) -> None:
        """The control, and why the docstring says inside."""
        both = {"base": params, "lora": adapter}
        inside = lora_optimizer(optax.MultiSteps(sgd(), 2).gradient_transformation())
        outside = optax.MultiSteps(lora_optimizer(sgd()), 2).gradient_transformation()
        sizes = [
            sum(array.size for array in jax.tree.leaves(optimizer.init(both)))
            for optimizer in (inside, outside)
        ]
        base = sum(leaf.size for leaf in jax.tree.leaves(params))
        scales = len(SIZES)
        assert sizes[1] - sizes[0] == base + scales


class TestCompiledStep:
    """The text that XLA prints of the compiled step, with the state donated."""

    # A line of HLO: "%name = f32[3072,128]{1,0} opcode(". Tuples are no arrays and do not match.
    LINE = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = \w+\[([\d,]*)\]\S* ([\w\-]+)\(", re.MULTILINE)
    # What names or moves a value without computing one.
    PASSIVE = ("parameter", "get-tuple-element", "copy", "copy-start", "copy-done", "bitcast")
    PRODUCTS = ("dot", "convolution", "custom-call")

    def operations(
        self,
        loss: Callable[..., jax.Array],
        optimizer: optax.GradientTransformation,
        trained: Any,
        frozen: Any,
        batch: Batch,
    ) -> list[tuple[tuple[int, ...], str]]:
        state = TrainState.create(trained, optimizer, frozen)
        step = jax.jit(train_step(loss, optimizer), donate_argnums=0)
        text = step.lower(state, batch).compile().as_text()
        found = self.LINE.findall(text)
        return [(tuple(map(int, filter(None, dims.split(",")))), op) for dims, op in found]

    def weight_shaped(self, operations: list[tuple[tuple[int, ...], str]]) -> Counter[str]:
        """The operations that compute something of the shape of a kernel, by name.

        The last layer's 128 x 10 is left out: XLA may pad so small a matrix to another shape.
        """
        shapes = {shape for size in SIZES[:2] for shape in (size, size[::-1])}
        return Counter(op for shape, op in operations if shape in shapes and op not in self.PASSIVE)

    def products(self, operations: list[tuple[tuple[int, ...], str]]) -> int:
        return sum(op in self.PRODUCTS for _, op in operations)

    def test_computes_no_gradient_of_a_frozen_weight(
        self, params: Any, adapter: jl.Adapter, batch: Batch
    ) -> None:
        both = {"base": params, "lora": adapter}
        clip = optax.clip_by_global_norm(1.0)
        compile_both = lambda optimizer: self.operations(  # noqa: E731
            loss_of_both, optimizer, both, None, batch
        )
        alone = self.operations(loss_of_adapter, lora_optimizer(sgd()), adapter, params, batch)
        beside = compile_both(lora_optimizer(sgd()))
        clipped_inside = compile_both(lora_optimizer(optax.chain(clip, sgd())))
        for operations in (alone, beside, clipped_inside):
            assert not self.weight_shaped(operations)
            # Forward x W, x A, (x A) B in each of three layers. Backward in each layer, from the
            # gradient dy of its output: dB, dy B', dA; and, except in the first, through W and A.
            assert self.products(operations) == 3 * 3 + 3 * 3 + 2 * 2

        # The control: with these, every frozen weight's gradient is a product more.
        for optimizer in (optax.chain(clip, lora_optimizer(sgd())), sgd()):
            operations = compile_both(optimizer)
            assert self.weight_shaped(operations)["dot"] >= 2
            assert self.products(operations) == 22 + 3

    def test_donated_state_is_reused(self, params: Any, adapter: jl.Adapter, batch: Batch) -> None:
        """Differentiating the whole tree does not copy the base, which comes out as it went in."""
        both = {"base": params, "lora": adapter}
        state = TrainState.create(both, lora_optimizer(sgd()))
        state = jax.tree.map(jnp.copy, state)
        pointers = {
            path: leaf.unsafe_buffer_pointer() for path, leaf in leaves_by_path(state.trained)
        }
        step = jax.jit(train_step(loss_of_both, lora_optimizer(sgd())), donate_argnums=0)
        after, _ = step(state, batch)
        for path, leaf in leaves_by_path(after.trained):
            assert leaf.unsafe_buffer_pointer() == pointers[path], path
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trained))


class TestLoraPlus:
    #: What each variant trains with the learning rate itself, and with `ratio` times it.
    GROUPS: ClassVar[dict[str, tuple[set[str], set[str]]]] = {
        "lora": ({"a"}, {"b"}),
        "lora-fa": (set(), {"b"}),
        "dora": ({"a"}, {"b", "magnitude"}),
        "vera": (set(), {"d", "g"}),
        "loha": ({"a1", "a2"}, {"b1", "b2"}),
        "lokr": ({"c", "a"}, {"b"}),
        "full": ({"value"}, set()),
        "rows": ({"value"}, set()),
    }

    @pytest.fixture
    def trees(self, adapter: jl.Adapter) -> tuple[Any, Any]:
        """Values and gradients that are as large in the base as in the adapter."""
        rng = np.random.default_rng(3)
        tree = {"base": {"w": jnp.ones((5, 4))}, "lora": adapter}
        return tree, jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), tree
        )

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_labels_of_every_variant(self, variant: str) -> None:
        """A new variant fails here, so that somebody decides."""
        slower, faster = self.GROUPS[variant]
        params = {"w": jnp.ones((6, 4))}
        rule = jl.Rule("w", rows=(1, 2)) if variant == "rows" else jl.Rule("w", variant=variant)

        def model(p: Any, ids: Any) -> Any:
            return p["w"][ids] @ p["w"].T

        plan = jl.plan(model, params, jnp.arange(3), config=jl.LoraConfig(2, targets=rule))
        adapter = jl.init(jax.random.key(0), params, plan)
        found = lora_plus_labels({"base": params, "lora": adapter})
        assert found["base"]["w"] == FROZEN
        entry = adapter["w"]
        assert slower | faster == entry.TRAINED
        wanted = dict.fromkeys(entry.arrays(), FROZEN)
        wanted |= dict.fromkeys(slower, TRAINED) | dict.fromkeys(faster, FASTER)
        assert found["lora"]["w"].arrays() == wanted
        # And it steps.
        optimizer = lora_plus(optax.sgd, 0.5, ratio=3.0)
        ones = jax.tree.map(jnp.ones_like, adapter)
        updates, _ = optimizer.update(ones, optimizer.init(adapter), adapter)
        rates = {TRAINED: 0.5, FASTER: 1.5, FROZEN: 0.0}
        for name, update in updates["w"].arrays().items():
            np.testing.assert_array_equal(update, -rates[wanted[name]] * np.ones(update.shape))

    @pytest.mark.parametrize("jit", [False, True])
    def test_gradient_descent_in_closed_form(self, trees: tuple[Any, Any], jit: bool) -> None:
        tree, grads = trees
        optimizer = lora_plus(optax.sgd, 0.25, ratio=8.0)  # powers of two: no rounding
        state = optimizer.init(tree)
        update = jax.jit(optimizer.update) if jit else optimizer.update
        updates, _ = update(grads, state, tree)
        np.testing.assert_array_equal(updates["base"]["w"], np.zeros((5, 4)))
        for path, entry in updates["lora"].items():
            np.testing.assert_array_equal(entry.a, -0.25 * grads["lora"][path].a)
            np.testing.assert_array_equal(entry.b, -2.0 * grads["lora"][path].b)
            assert float(entry.scale) == 0.0

    def test_a_schedule_is_multiplied_at_every_step(self, trees: tuple[Any, Any]) -> None:
        tree, grads = trees
        rates = [1.0, 0.5, 0.125]

        def schedule(count: Any) -> Any:
            return jnp.asarray(rates, jnp.float32)[count]

        optimizer = lora_plus(optax.sgd, schedule, ratio=4.0)
        state = optimizer.init(tree)
        update = jax.jit(optimizer.update)
        for rate in rates:
            updates, state = update(grads, state, tree)
            for path, entry in updates["lora"].items():
                np.testing.assert_array_equal(entry.a, -rate * grads["lora"][path].a)
                np.testing.assert_array_equal(entry.b, -4 * rate * grads["lora"][path].b)

    @pytest.mark.parametrize("scheduled", [False, True])
    def test_adam_is_two_adams(self, trees: tuple[Any, Any], scheduled: bool) -> None:
        tree, grads = trees
        lora, of_lora = tree["lora"], grads["lora"]
        rate: Any = optax.linear_schedule(1e-2, 1e-3, 5) if scheduled else 1e-2
        more: Any = (lambda count: 16 * rate(count)) if scheduled else 16e-2
        optimizer = lora_plus(lambda lr: optax.adamw(lr, weight_decay=0.1), rate)
        parts = {
            "a": (optax.adamw(rate, weight_decay=0.1), {p: e.a for p, e in lora.items()}),
            "b": (optax.adamw(more, weight_decay=0.1), {p: e.b for p, e in lora.items()}),
        }
        with jax.numpy_dtype_promotion("standard"):
            state = optimizer.init(tree)
            states = {name: o.init(x) for name, (o, x) in parts.items()}
            for _ in range(3):
                updates, state = optimizer.update(grads, state, tree)
                for name, (one, values) in parts.items():
                    g = {path: getattr(e, name) for path, e in of_lora.items()}
                    wanted, states[name] = one.update(g, states[name], values)
                    for path, value in wanted.items():
                        np.testing.assert_allclose(
                            getattr(updates["lora"][path], name), value, rtol=1e-6
                        )

    def test_a_ratio_of_one_is_the_ordinary_optimizer(self, trees: tuple[Any, Any]) -> None:
        tree, grads = trees
        plain, one = lora_optimizer(sgd()), lora_plus(momentum, 0.01, 1)
        updates = [o.update(grads, o.init(tree), tree)[0] for o in (plain, one)]
        jax.tree.map(np.testing.assert_array_equal, *updates)
        # The control: with another ratio they differ.
        two = lora_plus(momentum, 0.01, 2.0)
        other, _ = two.update(grads, two.init(tree), tree)
        assert any(
            (entry.b != updates[0]["lora"][path].b).any() for path, entry in other["lora"].items()
        )

    def test_state_is_that_of_what_is_trained(self, trees: tuple[Any, Any]) -> None:
        state = jax.tree.leaves(lora_plus(optax.adam, 1e-3).init(trees[0]))
        assert sum(array.size for array in state) == 2 * FACTORS + 2  # and a counter for each rate

    def test_trains_b_further_than_a_ratio_of_one(
        self, params: Any, adapter: jl.Adapter, batch: Batch
    ) -> None:
        """In the training step, with the base beside the adapter."""
        both = {"base": params, "lora": adapter}
        after = run(loss_of_both, lora_plus(optax.sgd, 0.001, 16.0), both, None, batch, steps=1)
        plain = run(loss_of_both, lora_plus(optax.sgd, 0.001, 1.0), both, None, batch, steps=1)
        jax.tree.map(np.testing.assert_array_equal, after["base"], params)
        for path, entry in after["lora"].items():
            before, reference = adapter[path], plain["lora"][path]
            np.testing.assert_array_equal(entry.a, reference.a)
            moved_by = [np.linalg.norm(e.b - before.b) for e in (entry, reference)]
            assert moved_by[0] == pytest.approx(16 * moved_by[1], rel=1e-3)

    @pytest.mark.parametrize("ratio", [0, -1.0, math.inf, math.nan, True, "16", None])
    def test_impossible_ratios(self, ratio: Any) -> None:
        with pytest.raises(jl.ConfigError, match="ratio of learning rates to be positive, got"):
            lora_plus(optax.sgd, 0.1, ratio)

    def test_a_tree_without_an_adapter_is_refused(self) -> None:
        with pytest.raises(jl.AdapterError, match="there is nothing to train"):
            lora_plus(optax.sgd, 0.1).init({"w": jnp.ones(2)})


def momentum(rate: Any) -> optax.GradientTransformation:
    return optax.sgd(rate, momentum=0.9)


def leaves_by_path(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [
        (jax.tree_util.keystr(path), leaf) for path, leaf in leaves if math.prod(leaf.shape) > 1
    ]
