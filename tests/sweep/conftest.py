"""A small problem to sweep over, and the run of one trial alone, step by step."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_lora as jl
from jax_lora.training import Batch, TrainState, epoch_order, train_step

# No two products of these and of the numbers of trials are equal: see test_program.py.
EXAMPLES, BATCH, SIZES = 37, 8, (11, 13, 4)
# Compiling takes longer than running here.
QUICK = {"xla_backend_optimization_level": 0}


def network(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w1"]) @ params["w2"]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Parameters, data, and what `jl.sweep.run` takes besides trials and settings."""

    params: Any
    train: Any
    test: Any

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "loss_fun": self.loss,
            "params": self.params,
            "train": self.train,
            "plan": self.plan,
            "optimizer": self.optimizer,
            "config": self.config,
            "metric_fun": self.metrics,
            "test": self.test,
            "compiler_options": QUICK,
        }

    config = jl.LoraConfig(rank=2, alpha=2.0, scaling="alpha", targets="*")
    # More decimals than the labels have, so that no two trials tie.
    metric_names = ("accuracy", "margin")

    def plan(self, config: jl.LoraConfig) -> jl.Plan:
        return jl.plan(network, self.params, self.train["x"], config=config)

    def loss(self, adapter: Any, params: Any, batch: Any) -> jax.Array:
        logits = jl.apply(network)(params, adapter, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    def noisy_loss(self, adapter: Any, params: Any, batch: Any, key: Any) -> jax.Array:
        return self.loss(jl.dropout(adapter, key, 0.3), params, batch)

    def metrics(self, adapter: Any, params: Any, batch: Any) -> dict[str, jax.Array]:
        logits = jl.apply(network)(params, adapter, batch["x"])
        return {"accuracy": logits.argmax(-1) == batch["y"], "margin": logits.max(-1)}

    def optimizer(self, trial: Any) -> optax.GradientTransformation:
        decay = optax.add_decayed_weights(trial.weight_decay)
        return optax.chain(decay, optax.sgd(trial.learning_rate, momentum=0.9))

    @functools.cache  # noqa: B019 - there is one problem
    def start(self, trial: jl.sweep.Trial) -> tuple[jl.Adapter, jax.Array]:
        """The adapter of a trial before the first step, and the key of its shuffles."""
        init_key, order_key = jax.random.split(jax.random.key(trial.seed))
        return jl.init(init_key, self.params, self.plan(trial.config(self.config))), order_key

    def alone(
        self,
        trial: jl.sweep.Trial,
        epochs: int,
        order_key: jax.Array | None = None,
        optimizer: Any = None,
        noisy: bool = False,
    ) -> tuple[jl.Adapter, list[float]]:
        """The adapter and the mean loss of each epoch: a loop in Python over single steps.

        Args:
            trial: The trial.
            epochs: How many.
            order_key: The key of the shuffles; the trial's own by default.
            optimizer: As of the sweep.
            noisy: Whether the loss is the one with dropout.
        """
        adapter, own = self.start(trial)
        make, numbers, words = optimizer or self.optimizer, {}, {}
        for name, value in trial.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            (numbers if number else words)[name] = jnp.float32(value) if number else value
        tx = jl.optim.lora_optimizer(make(types.SimpleNamespace(**words, **numbers)))
        noise = jax.random.fold_in(own, 2**32 - 1) if noisy else None
        state, losses = TrainState.create(adapter, tx, self.params, noise), []
        step = _step(self, make, tuple(words.items()), noisy)
        for epoch in range(epochs):
            key = jax.random.fold_in(own if order_key is None else order_key, epoch)
            found = []
            for rows, weights in zip(*epoch_order(key, EXAMPLES, BATCH), strict=True):
                batch = jax.tree.map(lambda array, rows=rows: array[np.asarray(rows)], self.train)
                state, metrics = step(state, Batch(batch, weights), numbers)
                found.append(float(metrics["loss"]))
            losses.append(float(np.mean(found)))
        return state.trained, losses


@functools.cache
def _step(problem: Any, make: Any, words: Any, noisy: bool) -> Any:
    """A single step, compiled once for all trials whose adapters have the same shapes."""

    def step(state: TrainState, batch: Batch, numbers: Any) -> Any:
        tx = jl.optim.lora_optimizer(make(types.SimpleNamespace(**dict(words), **numbers)))
        return train_step(problem.noisy_loss if noisy else problem.loss, tx)(state, batch)

    return jax.jit(step, compiler_options=QUICK)


@pytest.fixture(scope="session")
def problem() -> Problem:
    rng = np.random.default_rng(0)
    n_in, hidden, n_out = SIZES
    params = {
        "w1": jnp.asarray(rng.normal(0, 0.5, (n_in, hidden)), jnp.float32),
        "w2": jnp.asarray(rng.normal(0, 0.5, (hidden, n_out)), jnp.float32),
    }

    def split(size: int) -> Any:
        x = rng.normal(size=(size, n_in)).astype(np.float32)
        return {"x": x, "y": x[:, :n_out].argmax(-1).astype(np.int32)}

    return Problem(params, split(EXAMPLES), split(23))


@pytest.fixture(scope="session")
def close() -> Callable[[Any, Any], None]:
    """Check two trees for equality but for the order of sums in float32."""

    def check(found: Any, expected: Any, rtol: float = 2e-5) -> None:
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        for one, other in pairs:
            assert one.shape == other.shape
            size = np.abs(np.asarray(other)).max()
            np.testing.assert_allclose(one, other, rtol=0, atol=rtol * size)

    return check
