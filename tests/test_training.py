"""Steps against hand-written ones, epochs against loops of steps, devices against one device."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_lora as jl
from jax_lora.optim import lora_optimizer
from jax_lora.training import (
    Batch,
    DataParallel,
    Step,
    TrainState,
    epoch_order,
    epoch_over_arrays,
    epoch_over_batches,
    evaluate,
    in_order,
    prefetch,
    stream,
    train_step,
)

IN, HIDDEN, OUT, RANK, EXAMPLES = 6, 5, 3, 2, 37
RATE, MOMENTUM = 0.1, 0.9
Tree = dict[str, Any]


def network(params: Tree, x: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


adapted = jl.apply(network)


def loss_of_params(params: Tree, frozen: Any, data: Tree) -> jax.Array:
    logits = network(params, data["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, data["y"])


def loss_of_adapter(adapter: jl.Adapter, params: Tree, data: Tree) -> jax.Array:
    logits = adapted(params, adapter, data["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, data["y"])


def sgd() -> optax.GradientTransformation:
    return optax.sgd(RATE, momentum=MOMENTUM)


@pytest.fixture(scope="module")
def params() -> Tree:
    rng = np.random.default_rng(0)
    shapes = {"w1": (IN, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, OUT), "b2": (OUT,)}
    return {k: jnp.asarray(rng.normal(0, 0.5, s), jnp.float32) for k, s in shapes.items()}


@pytest.fixture(scope="module")
def adapter() -> jl.Adapter:
    rng = np.random.default_rng(1)
    entries = {}
    for path, shape in (("w1", (IN, HIDDEN)), ("w2", (HIDDEN, OUT))):
        layout = jl.Layout(shape, in_axes=(0,), out_axes=(1,))
        a, b = (rng.normal(0, 0.5, s) for s in (layout.a_shape(RANK), layout.b_shape(RANK)))
        entries[path] = jl.LoraFactors(
            jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), jnp.float32(0.7), layout
        )
    return jl.Adapter(entries)


@pytest.fixture(scope="module")
def arrays() -> Tree:
    rng = np.random.default_rng(2)
    return {
        "x": rng.normal(size=(EXAMPLES, IN)).astype(np.float32),
        "y": rng.integers(0, OUT, EXAMPLES, np.int32),
    }


def padded(arrays: Tree, rows: Any, size: int) -> Batch:
    """Some rows as a batch, the rest of it example 0 at weight 0."""
    index = np.zeros(size, int)
    index[: len(rows)] = rows
    weight = (np.arange(size) < len(rows)).astype(np.float32)
    return Batch({name: array[index] for name, array in arrays.items()}, jnp.asarray(weight))


def gradients_by_hand(weights: Tree, x: Any, y: Any) -> tuple[float, Tree]:
    """The mean loss and its gradient in every weight and bias, in float64."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    before = x @ w["w1"] + w["b1"]
    hidden = np.maximum(before, 0)
    logits = hidden @ w["w2"] + w["b2"]
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    loss = -np.log(shares[np.arange(len(y)), y]).mean()
    d_logits = (shares - np.eye(OUT)[y]) / len(y)
    d_before = (d_logits @ w["w2"].T) * (before > 0)
    return loss, {
        "w1": x.T @ d_before,
        "b1": d_before.sum(0),
        "w2": hidden.T @ d_logits,
        "b2": d_logits.sum(0),
    }


# Sums of at most 6 products in float32, a few steps: a few times 2^-24 of values near 1.
close = {"rtol": 2e-6, "atol": 2e-7}


class TestStep:
    ROWS = ([3, 1, 4, 15], [9, 2, 6, 5], [35, 8])

    def test_of_the_base_is_sgd_with_momentum(self, params: Tree, arrays: Tree) -> None:
        step = jax.jit(train_step(loss_of_params, sgd()))
        state = TrainState.create(params, sgd())
        weights = {name: np.asarray(value, np.float64) for name, value in params.items()}
        velocity = {name: np.zeros_like(value) for name, value in weights.items()}
        for done, rows in enumerate(self.ROWS, start=1):
            state, metrics = step(state, padded(arrays, rows, 4))
            loss, grads = gradients_by_hand(weights, arrays["x"][rows], arrays["y"][rows])
            velocity = {name: MOMENTUM * velocity[name] + grads[name] for name in weights}
            weights = {name: weights[name] - RATE * velocity[name] for name in weights}
            np.testing.assert_allclose(metrics["loss"], loss, **close)
            assert state.step == done
            for name, value in state.trained.items():
                np.testing.assert_allclose(value, weights[name], **close, err_msg=name)

    def test_of_lora_is_sgd_with_momentum_on_a_and_b(
        self, params: Tree, adapter: jl.Adapter, arrays: Tree
    ) -> None:
        optimizer = lora_optimizer(sgd())
        step = jax.jit(train_step(loss_of_adapter, optimizer))
        state = TrainState.create(adapter, optimizer, params)
        factors = {
            path: {"a": np.asarray(f.a, np.float64), "b": np.asarray(f.b, np.float64)}
            for path, f in adapter.items()
        }
        velocity = jax.tree.map(np.zeros_like, factors)
        scale = float(np.float32(0.7))
        for rows in self.ROWS:
            state, metrics = step(state, padded(arrays, rows, 4))
            updates = {path: scale * f["a"] @ f["b"] for path, f in factors.items()}
            merged = {k: np.asarray(v, np.float64) + updates.get(k, 0) for k, v in params.items()}
            loss, grads = gradients_by_hand(merged, arrays["x"][rows], arrays["y"][rows])
            for path, f in factors.items():
                d = {"a": scale * grads[path] @ f["b"].T, "b": scale * f["a"].T @ grads[path]}
                velocity[path] = {k: MOMENTUM * velocity[path][k] + d[k] for k in "ab"}
                factors[path] = {k: f[k] - RATE * velocity[path][k] for k in "ab"}
            np.testing.assert_allclose(metrics["loss"], loss, **close)
            for path, f in factors.items():
                np.testing.assert_allclose(state.trained[path].a, f["a"], **close, err_msg=path)
                np.testing.assert_allclose(state.trained[path].b, f["b"], **close, err_msg=path)
                assert state.trained[path].scale == adapter[path].scale
        for name, value in state.frozen.items():
            assert np.asarray(value).tobytes() == np.asarray(params[name]).tobytes()

    def test_padding_makes_a_short_batch_its_own_mean(self, params: Tree, arrays: Tree) -> None:
        state = TrainState.create(params, sgd())
        step = jax.jit(train_step(loss_of_params, sgd()))
        rows = [3, 1, 4]
        exact, exact_metrics = step(state, padded(arrays, rows, 3))
        short, short_metrics = step(state, padded(arrays, rows, 8))
        # The zeros added to a sum change nothing; only the order of summation may differ.
        np.testing.assert_allclose(short_metrics["loss"], exact_metrics["loss"], rtol=3e-7)
        for name in params:
            np.testing.assert_allclose(
                short.trained[name], exact.trained[name], rtol=5e-7, atol=1e-7
            )
        # The control: counted as examples, the padding has a loss of its own.
        counted = padded(arrays, rows, 8)._replace(weight=jnp.ones(8))
        assert abs(step(state, counted)[1]["loss"] - exact_metrics["loss"]) > 1e-3


class TestOrder:
    @pytest.mark.parametrize(("examples", "size"), [(37, 8), (40, 8), (3, 8), (1, 1), (7, 1)])
    def test_is_a_permutation_in_batches(self, examples: int, size: int) -> None:
        indices, weights = map(np.asarray, epoch_order(jax.random.key(0), examples, size))
        steps = -(-examples // size)
        assert indices.shape == weights.shape == (steps, size)
        assert indices.dtype == np.int32
        assert weights.dtype == np.float32
        flat = weights.ravel()
        # Padding is at the end, at index 0 and weight 0; everything before it has weight 1.
        assert (flat == (np.arange(steps * size) < examples)).all()
        assert sorted(indices.ravel()[flat == 1]) == list(range(examples))
        assert (indices.ravel()[flat == 0] == 0).all()

    def test_depends_on_the_key_alone(self) -> None:
        orders = [epoch_order(jax.random.key(seed), 37, 8)[0] for seed in (0, 0, 1)]
        assert (orders[0] == orders[1]).all()
        assert (orders[0] != orders[2]).any()
        assert (orders[0] != in_order(37, 8)[0]).any()

    def test_in_order_is_in_order(self) -> None:
        indices, weights = in_order(5, 3)
        assert indices.tolist() == [[0, 1, 2], [3, 4, 0]]
        assert weights.tolist() == [[1, 1, 1], [1, 1, 0]]


class TestEpoch:
    def by_steps(
        self, step: Step, state: TrainState, arrays: Tree, order: Any
    ) -> tuple[TrainState, np.ndarray]:
        losses = []
        step = jax.jit(step)
        for indices, weights in zip(*map(np.asarray, order), strict=True):
            batch = Batch({k: v[indices] for k, v in arrays.items()}, jnp.asarray(weights))
            state, metrics = step(state, batch)
            losses.append(metrics["loss"])
        return state, np.array(losses)

    def assert_same(self, state: TrainState, losses: Any, expected: Any) -> None:
        # The same operations; fused inside the loop, they may round differently.
        np.testing.assert_allclose(losses, expected[1], rtol=2e-6)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=5e-6, atol=5e-7),
            (state.trained, state.opt_state),
            (expected[0].trained, expected[0].opt_state),
        )
        assert state.step == expected[0].step

    @pytest.mark.parametrize("lora", [False, True])
    def test_is_the_loop_of_its_steps_resident_and_streamed(
        self, params: Tree, adapter: jl.Adapter, arrays: Tree, lora: bool
    ) -> None:
        optimizer = lora_optimizer(sgd()) if lora else sgd()
        step = train_step(loss_of_adapter if lora else loss_of_params, optimizer)
        if lora:
            start = TrainState.create(adapter, optimizer, params)
        else:
            start = TrainState.create(params, optimizer)
        order = epoch_order(jax.random.key(3), EXAMPLES, 8)
        expected = self.by_steps(step, start, arrays, order)
        assert len(expected[1]) == 5
        assert len(set(expected[1].tolist())) == 5

        parallel = DataParallel("jit", (jax.devices()[0],))
        on_device = parallel.replicate(arrays)
        split = parallel.split(order)
        run = parallel.compile(
            lambda state, arrays, order: epoch_over_arrays(step, state, arrays, order),
            start,
            on_device,
            split,
        )
        state, metrics = run(start, on_device, split)
        self.assert_same(state, metrics["loss"], expected)
        if lora:
            jax.tree.map(np.testing.assert_array_equal, state.frozen, params)

        for length in (2, 5, 100):  # with a shorter last chunk, in one chunk, in a longer one
            streamed, losses = start, []
            chunks = stream(arrays, *map(np.asarray, order), steps_per_chunk=length)
            for chunk in prefetch(chunks, parallel.split):
                streamed, metrics = epoch_over_batches(step, streamed, chunk)
                losses.append(metrics["loss"])
            assert len(losses) == -(-5 // length)
            self.assert_same(
                streamed, np.concatenate(losses), (state, run(start, on_device, split)[1]["loss"])
            )

    def test_is_one_program_without_a_step_in_python(self, params: Tree, arrays: Tree) -> None:
        traces = {3: 0, 10: 0}
        for steps in traces:

            def loss_fun(params: Tree, frozen: Any, data: Tree, steps: int = steps) -> jax.Array:
                traces[steps] += 1
                return loss_of_params(params, frozen, data)

            step = train_step(loss_fun, sgd())
            parallel = DataParallel("jit", (jax.devices()[0],))
            orders = [epoch_order(jax.random.key(k), 3 * steps, 3) for k in range(3)]
            state = TrainState.create(params, sgd())
            run = parallel.compile(
                lambda state, arrays, order, step=step: epoch_over_arrays(
                    step, state, arrays, order
                ),
                state,
                arrays,
                parallel.split(orders[0]),
            )
            assert run.seconds > 0
            after_compiling = traces[steps]
            for order in orders:
                state, _ = run(state, arrays, parallel.split(order))
            assert traces[steps] == after_compiling
            assert state.step == 3 * steps
        # As often for an epoch of ten steps as for one of three.
        assert traces[3] == traces[10] > 0


class TestParts:
    """An epoch in parts has the bits of the epoch, whatever the parts."""

    STEPS, SIZE = 10, 4

    def noisy_loss(self, params: Tree, frozen: Any, data: Tree, key: jax.Array) -> jax.Array:
        kept = jax.random.bernoulli(key, 0.8, data["x"].shape)
        return loss_of_params(params, frozen, data | {"x": jnp.where(kept, data["x"], 0)})

    @pytest.mark.parametrize("how", ["jit", "pmap"])
    def test_have_the_bits_of_the_whole_with_one_program(
        self, params: Tree, arrays: Tree, how: Any
    ) -> None:
        traces = 0

        def loss_fun(*args: Any) -> jax.Array:
            nonlocal traces
            traces += 1
            return self.noisy_loss(*args)

        parallel = DataParallel(how, (jax.devices()[0],))
        step = train_step(loss_fun, sgd(), axis_name=parallel.axis_name)
        fresh = TrainState.create(params, sgd(), key=jax.random.key(1))
        order = parallel.split(epoch_order(jax.random.key(3), EXAMPLES, self.SIZE))
        run = parallel.compile(
            lambda state, start, stop, order: epoch_over_arrays(
                step, state, arrays, order, start, stop
            ),
            fresh,
            *(jnp.int32(0), jnp.int32(0)),
            order,
        )
        compiled = traces

        def in_parts(*ends: int) -> tuple[TrainState, np.ndarray]:
            state, losses, start = fresh, [], 0
            for stop in ends:
                state, metrics = run(state, jnp.int32(start), jnp.int32(stop), order)
                loss = np.asarray(metrics["loss"])
                assert (loss[:start] == 0).all()
                assert (loss[stop:] == 0).all()
                losses.append(loss[start:stop])
                start = stop
            return state, np.concatenate(losses)

        whole, losses = in_parts(self.STEPS)
        assert len(set(losses.tolist())) == self.STEPS
        for ends in ((3, 10), tuple(range(1, 11)), (0, 4, 4, 9, 10)):
            state, others = in_parts(*ends)
            assert others.tobytes() == losses.tobytes()
            for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
                assert (one == other).all()
        assert traces == compiled
        # The control: without the first step all is different.
        late, _ = run(fresh, jnp.int32(1), jnp.int32(self.STEPS), order)
        assert (late.trained["w1"] != whole.trained["w1"]).any()

    def test_a_step_has_the_key_of_its_number(self, params: Tree, arrays: Tree) -> None:
        key, batch = jax.random.key(5), padded(arrays, [3, 1, 4, 15], 4)
        step = jax.jit(train_step(self.noisy_loss, sgd()))
        state = TrainState.create(params, sgd(), key=key)
        for number in range(3):
            loss = self.noisy_loss(
                state.trained, None, batch.data, jax.random.fold_in(key, number)
            ).mean()
            state, metrics = step(state, batch)
            np.testing.assert_allclose(metrics["loss"], loss, **close)
            other = self.noisy_loss(state.trained, None, batch.data, key).mean()
            assert abs(metrics["loss"] - other) > 1e-3
        assert (state.key == key).all()


class TestPrefetch:
    def test_is_one_chunk_ahead_and_no_more(self) -> None:
        log: list[str] = []

        def chunks() -> Any:
            for index in range(4):
                log.append(f"cut {index}")
                yield index

        def put(index: int) -> int:
            log.append(f"put {index}")
            return 10 * index

        seen = []
        for moved in prefetch(chunks(), put):
            log.append(f"use {moved // 10}")
            seen.append(moved)
        assert seen == [0, 10, 20, 30]
        for index in range(3):
            assert log.index(f"put {index + 1}") < log.index(f"use {index}")
        for index in range(2):
            assert log.index(f"use {index}") < log.index(f"cut {index + 2}")

    def test_of_nothing_and_of_one(self) -> None:
        assert list(prefetch([], str)) == []
        assert list(prefetch([1], str)) == ["1"]


class TestEvaluate:
    @pytest.mark.parametrize("size", [8, 37, 64, 1])
    def test_is_the_mean_over_all_examples(self, params: Tree, arrays: Tree, size: int) -> None:
        def metrics(trained: Tree, frozen: Any, data: Tree) -> dict[str, jax.Array]:
            right = network(trained, data["x"]).argmax(-1) == data["y"]
            return {"accuracy": right, "loss": loss_of_params(trained, frozen, data)}

        logits = network(params, arrays["x"])
        right = np.asarray(logits.argmax(-1) == arrays["y"])
        losses = np.asarray(loss_of_params(params, None, arrays), np.float64)
        found = evaluate(metrics, params, None, arrays, in_order(EXAMPLES, size))
        # Both counts are small integers, so that their quotient is rounded once.
        assert found["accuracy"] == np.float32(right.sum()) / np.float32(EXAMPLES)
        np.testing.assert_allclose(found["loss"], losses.mean(), rtol=5e-7)
        assert 0 < right.sum() < EXAMPLES
        if size == 8:  # the control: the mean of the batches' means is another number
            per_batch = [losses[k : k + 8].mean() for k in range(0, EXAMPLES, 8)]
            assert abs(np.mean(per_batch) - losses.mean()) > 1e-3


class TestDataParallel:
    def test_how_is_jit_or_pmap(self) -> None:
        with pytest.raises(jl.ConfigError, match="expected 'jit' or 'pmap', got 'xmap'"):
            DataParallel("xmap")  # type: ignore[arg-type]

    @pytest.mark.parametrize("how", ["jit", "pmap"])
    def test_devices_that_cannot_share_a_batch(self, how: Any) -> None:
        parallel = DataParallel(how, tuple(jax.devices()[:1]) * 3)
        with pytest.raises(jl.ConfigError, match="that 3 devices can share, got 8; use a multiple"):
            parallel.split(jnp.ones((2, 8)))

    def test_all_local_devices_by_default(self) -> None:
        assert DataParallel().devices == tuple(jax.local_devices())
        assert DataParallel("jit").axis_name is None
        assert DataParallel("pmap").axis_name is not None


# Runs in a process with eight devices: every way to train one epoch and to evaluate.
EIGHT_DEVICES = """
import json, sys
import jax, jax.numpy as jnp, numpy as np, optax
import jax_lora as jl
from jax_lora.training import *
from jax_lora.training import Batch

def network(params, x):
    return jax.nn.relu(x @ params["w1"]) @ params["w2"]

rng = np.random.default_rng(0)
params = {"w1": jnp.asarray(rng.normal(0, .5, (6, 5)), jnp.float32),
          "w2": jnp.asarray(rng.normal(0, .5, (5, 3)), jnp.float32)}
arrays = {"x": rng.normal(size=(37, 6)).astype(np.float32), "y": rng.integers(0, 3, 37, np.int32)}
plan = jl.plan(network, params, arrays["x"], config=jl.LoraConfig(rank=2, alpha=3))
adapter = jax.tree.map(lambda x: x + .1, jl.init(jax.random.key(0), params, plan))
adapted = jl.apply(network)
optimizer = jl.optim.lora_optimizer(optax.sgd(.1, momentum=.9))

def losses(adapter, params, data):
    logits = adapted(params, adapter, data["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, data["y"])

def right(adapter, params, data):
    return {"accuracy": adapted(params, adapter, data["x"]).argmax(-1) == data["y"]}

def run(how, count, seed=0, streamed=False, axis_name="as it says"):
    parallel = DataParallel(how, tuple(jax.local_devices()[:count]))
    if axis_name == "as it says":
        axis_name = parallel.axis_name
    step = train_step(losses, optimizer, axis_name=axis_name)
    state = TrainState.create(adapter, optimizer, params)
    order = epoch_order(jax.random.key(seed), 37, 16)
    if streamed:
        found, epoch = [], None
        chunks = stream(arrays, *map(np.asarray, order), steps_per_chunk=3)
        for chunk in prefetch(chunks, parallel.split):
            epoch = epoch or parallel.compile(
                lambda state, batches: epoch_over_batches(step, state, batches), state, chunk)
            state, metrics = epoch(state, chunk)
            found += np.asarray(metrics["loss"]).tolist()
    else:
        data, split = parallel.replicate(arrays), parallel.split(order)
        epoch = parallel.compile(
            lambda state, arrays, order: epoch_over_arrays(step, state, arrays, order),
            state, data, split)
        state, metrics = epoch(state, data, split)
        found = np.asarray(metrics["loss"]).tolist()
    data, split = parallel.replicate(arrays), parallel.split(in_order(37, 16))
    measure = parallel.compile(
        lambda trained, frozen, arrays, order: evaluate(
            right, trained, frozen, arrays, order, axis_name=parallel.axis_name)["accuracy"],
        state.trained, params, data, split)
    copies = [np.asarray(shard.data).tobytes()
              for shard in state.trained["w1"].a.addressable_shards]
    return {
        "losses": found,
        "accuracy": float(measure(state.trained, params, data, split)),
        "a": np.asarray(state.trained["w1"].a).ravel().tolist(),
        "copies": len(copies), "distinct": len(set(copies)),
        "step": int(state.step),
        "devices": len(split[0].sharding.device_set),
    }

out = {f"{how} {count}": run(how, count) for how in ("jit", "pmap") for count in (1, 8)}
out["streamed jit 8"] = run("jit", 8, streamed=True)
out["streamed pmap 8"] = run("pmap", 8, streamed=True)
out["other seed"] = run("jit", 8, seed=1)
out["unsummed"] = run("pmap", 8, axis_name=None)

key = jax.random.key(4)
noisy = train_step(
    lambda w, frozen, x, key: w * jax.random.uniform(key, x.shape), optax.sgd(0.1), axis_name="d")
noise = jax.pmap(noisy, "d", in_axes=(None, 0), out_axes=(None, None))(
    TrainState.create(jnp.ones(()), optax.sgd(0.1), key=key), Batch(*[jnp.ones((8, 2))] * 2))
draws = [jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, 0), k), 2) for k in range(8)]
out["noise"] = [float(noise[1]["loss"]), float(np.mean(draws)), float(np.mean(draws[0]))]
for how in ("jit", "pmap"):
    try:
        DataParallel(how).split(jnp.ones((3, 12)))
    except jl.ConfigError as error:
        out["error " + how] = str(error)
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def on_eight_devices() -> Tree:
    root = str(Path(jl.__file__).parents[1])
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, "-W", "error", "-c", EIGHT_DEVICES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: Tree = json.loads(done.stdout)
    return found


class TestEightDevices:
    WAYS = ("jit 8", "pmap 1", "pmap 8", "streamed jit 8", "streamed pmap 8")

    @pytest.mark.parametrize("way", WAYS)
    def test_same_numbers_as_on_one(self, on_eight_devices: Tree, way: str) -> None:
        one, other = on_eight_devices["jit 1"], on_eight_devices[way]
        # Sums in another order, in float32.
        np.testing.assert_allclose(other["losses"], one["losses"], rtol=5e-6)
        np.testing.assert_allclose(other["a"], one["a"], rtol=5e-6, atol=1e-6)
        assert other["accuracy"] == one["accuracy"]
        assert other["step"] == one["step"] == 3
        count = int(way.split()[-1])
        assert other["devices"] == other["copies"] == count
        assert other["distinct"] == 1

    @pytest.mark.parametrize("control", ["other seed", "unsummed"])
    def test_other_numbers_otherwise(self, on_eight_devices: Tree, control: str) -> None:
        one, other = on_eight_devices["jit 1"], on_eight_devices[control]
        assert np.abs(np.subtract(one["losses"], other["losses"])).max() > 1e-3

    def test_each_has_noise_of_its_own(self, on_eight_devices: Tree) -> None:
        found, expected, the_same_on_each = on_eight_devices["noise"]
        assert found == pytest.approx(expected, rel=1e-6)
        assert found != pytest.approx(the_same_on_each, rel=1e-2)

    @pytest.mark.parametrize("how", ["jit", "pmap"])
    def test_a_batch_they_cannot_share(self, on_eight_devices: Tree, how: str) -> None:
        assert "8 devices can share, got 12" in on_eight_devices[f"error {how}"]


def test_a_state_starts_at_step_0_and_is_a_value(params: Tree) -> None:
    state = TrainState.create(params, sgd(), frozen={"x": jnp.ones(2)})
    assert (state.step.dtype, int(state.step)) == (jnp.int32, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.step = jnp.ones(())  # type: ignore[misc]
    copied = jax.tree.map(lambda leaf: leaf, state)
    assert jax.tree.structure(copied) == jax.tree.structure(state)


def test_a_metric_that_is_no_number_for_each_example() -> None:
    """A mean, or a column, would broadcast against the weights and count the padding."""
    arrays, batches = jnp.ones((3, 2)), in_order(3, 2)
    for shape, words in (((), r"\(\)"), ((2, 1), r"\(2, 1\)")):
        with pytest.raises(
            jl.ConfigError, match=r"'m' of each example, of shape \(2,\), got " + words
        ):
            evaluate(lambda *_, shape=shape: {"m": jnp.ones(shape)}, None, None, arrays, batches)
