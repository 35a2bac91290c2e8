"""One phase: what it measures and when it stops."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_lora.errors import ConfigError, JaxLoraError
from jax_lora.experiments.fit import Phase, data_parallel, fit, normalize
from jax_lora.experiments.options import TrainOptions
from tests.experiments.small import CLASSES, DATASET, TEST, TRAIN, predict, start


def run(**options: Any) -> Phase:
    options = {"batch_size": 8, "epochs": 2, "learning_rate": 0.1, "num_devices": 1} | options
    chosen = TrainOptions(**options)
    return fit(
        predict, start(), None, chosen.optimizer(), DATASET, chosen, jax.random.key(0), "a phase"
    )


@pytest.fixture(scope="module")
def phase() -> Phase:
    return run()


def test_normalize() -> None:
    found = normalize(jnp.array([0, 51, 255], jnp.uint8), 255)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, [-1, -0.6, 1], rtol=1e-6)
    np.testing.assert_array_equal(normalize(jnp.array([0, 8, 16], jnp.uint8), 16), [-1, 0, 1])


def test_what_a_phase_measures(phase: Phase) -> None:
    steps = -(-TRAIN // 8)
    assert phase.steps_per_epoch == steps == 7
    assert phase.loss_window == steps // 3
    assert len(phase.loss) == 2 * (steps // phase.loss_window)
    assert len(phase.accuracy) == 2
    assert phase.state.step == 2 * steps
    assert phase.optimizer_bytes == 4 * 4 * CLASSES
    assert min(phase.compile_seconds, phase.run_seconds) > 0
    assert phase.accuracy[-1] > phase.accuracy_before


def test_accuracy_is_of_the_state_it_comes_with(phase: Phase) -> None:
    images = normalize(jnp.asarray(DATASET.test.images.reshape(TEST, -1)), 255)
    right = (predict(phase.state.trained, None, images).argmax(-1) == DATASET.test.labels).sum()
    assert phase.accuracy[-1] == np.float32(right) / np.float32(TEST)
    assert 0 < right < TEST


def test_losses_are_means_of_windows_that_stay_within_an_epoch(phase: Phase) -> None:
    """Against a loop over single steps with the shuffles the docstring promises."""
    from jax_lora.training import epoch_order

    images = jnp.asarray(DATASET.train.images.reshape(TRAIN, -1))
    weight = start()
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = optimizer.init(weight)

    @jax.jit
    def loss_and_grad(weight: Any, rows: Any, weights: Any) -> Any:
        def loss(weight: Any) -> jax.Array:
            logits = predict(weight, None, normalize(images[rows], 255))
            labels = jnp.asarray(DATASET.train.labels)[rows]
            each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return (each * weights).sum() / weights.sum()

        return jax.value_and_grad(loss)(weight)

    means = []
    for epoch in range(2):
        losses = []
        key = jax.random.fold_in(jax.random.key(0), epoch)
        for rows, weights in zip(*epoch_order(key, TRAIN, 8), strict=True):
            value, grad = loss_and_grad(weight, rows, weights)
            updates, state = optimizer.update(grad, state)
            weight = optax.apply_updates(weight, updates)
            losses.append(float(value))
        means += [np.mean(losses[k : k + 2]) for k in (0, 2, 4)]
    np.testing.assert_allclose(phase.loss, means, rtol=1e-5)
    np.testing.assert_allclose(phase.state.trained["w"], weight["w"], rtol=1e-5, atol=1e-6)


def test_streamed_and_pmapped_are_the_same_phase(phase: Phase) -> None:
    for options in ({"stream": True}, {"parallel": "pmap"}):
        other = run(**options)
        np.testing.assert_allclose(other.loss, phase.loss, rtol=1e-5)
        assert other.accuracy == phase.accuracy


def test_a_run_that_diverges_says_where_and_what_to_do() -> None:
    with pytest.raises(JaxLoraError) as caught:
        run(learning_rate=3e38, epochs=3)
    message = str(caught.value)
    assert message.startswith("expected a finite loss, got ")
    assert "epoch 1; lower --learning-rate or --alpha" in message


def test_more_devices_than_there_are() -> None:
    there = len(jax.local_devices())
    with pytest.raises(ConfigError, match=rf"--num-devices of at most {there}, got {there + 1}"):
        data_parallel(TrainOptions(num_devices=there + 1))
    assert data_parallel(TrainOptions()).devices == tuple(jax.local_devices())


@pytest.mark.parametrize(("batch_size", "used"), [(32, 4), (30, 3), (7, 1), (1, 1)])
def test_the_default_is_as_many_devices_as_can_share_a_batch(
    batch_size: int, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "local_devices", lambda: list("abcd"))
    assert len(data_parallel(TrainOptions(batch_size=batch_size)).devices) == used


def test_dataset_is_not_changed() -> None:
    before = dataclasses.replace(DATASET.train, images=DATASET.train.images.copy())
    run(epochs=1)
    assert (DATASET.train.images == before.images).all()
