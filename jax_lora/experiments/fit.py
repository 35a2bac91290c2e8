"""One phase of training: some epochs, each followed by an evaluation."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from jax_lora.data import Dataset, Split
from jax_lora.errors import ConfigError, JaxLoraError
from jax_lora.experiments.options import TrainOptions
from jax_lora.training import (
    Batch,
    Compiled,
    DataParallel,
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

#: ``predict(trained, frozen, images) -> logits``, for images scaled to [-1, 1].
Predict = Callable[[Any, Any, jax.Array], jax.Array]
_EVALUATION_BATCH = 1000


@dataclasses.dataclass(frozen=True)
class Phase:
    """The outcome of `fit`.

    Attributes:
        state: The state after the last epoch.
        accuracy_before: On the test split before the first step.
        accuracy: On the test split after each epoch, from 0 to 1.
        loss: The mean of each window of steps; a window never spans two epochs.
        loss_window: The number of steps in a window.
        steps_per_epoch: The number of steps in an epoch.
        compile_seconds: Tracing and compiling.
        run_seconds: Training and evaluating.
        optimizer_bytes: Bytes of the optimizer's state.
    """

    state: TrainState
    accuracy_before: float
    accuracy: list[float]
    loss: list[float]
    loss_window: int
    steps_per_epoch: int
    compile_seconds: float
    run_seconds: float
    optimizer_bytes: int


def losses_of(predict: Predict, max_value: int) -> Callable[[Any, Any, Any], jax.Array]:
    """The cross-entropy of each example, for batches ``{"image": uint8, "label": int32}``."""

    def loss_fun(trained: Any, frozen: Any, batch: Any) -> jax.Array:
        logits = predict(trained, frozen, normalize(batch["image"], max_value))
        return optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), batch["label"]
        )

    return loss_fun


def correct_of(predict: Predict, max_value: int) -> Callable[[Any, Any, Any], dict[str, jax.Array]]:
    """Whether each example is classified correctly, for the same batches."""

    def metric_fun(trained: Any, frozen: Any, batch: Any) -> dict[str, jax.Array]:
        logits = predict(trained, frozen, normalize(batch["image"], max_value))
        return {"accuracy": logits.argmax(-1) == batch["label"]}

    return metric_fun


def normalize(images: jax.Array, max_value: int) -> jax.Array:
    """Pixels from 0..max_value to float32 in [-1, 1]: ``x / (max_value / 2) - 1``."""
    return images.astype(jnp.float32) / (max_value / 2) - 1


def arrays_of(split: Split) -> dict[str, np.ndarray]:
    """A split as flattened images and labels."""
    return {"image": split.images.reshape(len(split.labels), -1), "label": split.labels}


def data_parallel(options: TrainOptions) -> DataParallel:
    """The devices that the options ask for; by default as many as can share a batch.

    Raises:
        ConfigError: There are fewer devices.
    """
    try:
        devices = jax.local_devices()
    except Exception as error:  # a RuntimeError or an AssertionError, by backend
        raise ConfigError(
            f"expected a JAX backend, found none that works ({error or type(error).__name__}); "
            "correct or unset JAX_PLATFORMS"
        ) from error
    sharing = (n for n in range(len(devices), 0, -1) if options.batch_size % n == 0)
    wanted = options.num_devices or next(sharing)
    if wanted > len(devices):
        raise ConfigError(f"expected --num-devices of at most {len(devices)}, got {wanted}")
    return DataParallel(options.parallel, tuple(devices[:wanted]))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _order(key: jax.Array, examples: int, batch_size: int) -> tuple[jax.Array, jax.Array]:
    return epoch_order(key, examples, batch_size)


class Evaluator:
    """The accuracy on a split, compiled once.

    Attributes:
        compile_seconds: Tracing and compiling.
    """

    def __init__(
        self,
        predict: Predict,
        split: Split,
        max_value: int,
        parallel: DataParallel,
        trained: Any,
        frozen: Any,
    ):
        metric = correct_of(predict, max_value)

        def run(trained: Any, frozen: Any, arrays: Any, batches: Any) -> Any:
            return evaluate(metric, trained, frozen, arrays, batches, axis_name=parallel.axis_name)[
                "accuracy"
            ]

        count = len(parallel.devices)
        batch_size = -(-min(_EVALUATION_BATCH, len(split)) // count) * count
        self._arrays = parallel.replicate(arrays_of(split))
        self._batches = parallel.split(in_order(len(split), batch_size))
        self._run = parallel.compile(run, trained, frozen, self._arrays, self._batches)
        self.compile_seconds = self._run.seconds

    def __call__(self, trained: Any, frozen: Any) -> float:
        """The share of the split's examples that are classified correctly."""
        return float(self._run(trained, frozen, self._arrays, self._batches))


def fit(
    predict: Predict,
    trained: Any,
    frozen: Any,
    optimizer: optax.GradientTransformation,
    dataset: Dataset,
    options: TrainOptions,
    key: jax.Array,
    title: str,
) -> Phase:
    """Train ``trained`` for ``options.epochs`` epochs, evaluating on the test split after each.

    Args:
        predict: The model.
        trained: The tree to train.
        frozen: The tree that stays as it is.
        optimizer: A fresh optimizer for ``trained``.
        dataset: The data.
        options: How to train.
        key: The key of the shuffles; epoch ``k`` uses ``fold_in(key, k)``.
        title: What the progress bar says.

    Returns:
        The state and the measurements.

    Raises:
        ConfigError: More devices than there are, or a batch size that they cannot share.
        JaxLoraError: The loss stopped being finite.
    """
    start = time.perf_counter()
    parallel = data_parallel(options)
    step = train_step(
        losses_of(predict, dataset.max_value), optimizer, axis_name=parallel.axis_name
    )
    state = TrainState.create(trained, optimizer, frozen)
    host = arrays_of(dataset.train)
    examples = len(dataset.train)

    def order(epoch: int) -> tuple[jax.Array, jax.Array]:
        return _order(jax.random.fold_in(key, epoch), examples, options.batch_size)

    run_epoch: _Resident | _Streamed
    if options.stream:
        run_epoch = _Streamed(step, parallel, host)
    else:
        run_epoch = _Resident(step, parallel, host, state, order(0))
    evaluator = Evaluator(predict, dataset.test, dataset.max_value, parallel, trained, frozen)
    steps = -(-examples // options.batch_size)
    window = 500 if steps >= 500 else max(1, steps // 3)

    before = evaluator(trained, frozen)
    accuracy: list[float] = []
    loss: list[float] = []
    with tqdm(total=options.epochs, desc=title, unit="epoch", disable=None) as bar:
        for epoch in range(options.epochs):
            began = time.perf_counter()
            state, losses = run_epoch(state, order(epoch))
            rate = steps / (time.perf_counter() - began)
            means = losses[: steps // window * window].reshape(-1, window).mean(axis=1)
            if not np.isfinite(losses).all():
                at = int(np.argmin(np.isfinite(losses))) + 1
                raise JaxLoraError(
                    f"expected a finite loss, got {losses[at - 1]} at step {at} of epoch "
                    f"{epoch + 1}; lower --learning-rate or --alpha"
                )
            loss += means.tolist()
            accuracy.append(evaluator(state.trained, state.frozen))
            shown = " ".join(f"{mean:.3f}" for mean in means)
            bar.write(f"[{title}, epoch {epoch + 1}] loss: {shown}  accuracy: {accuracy[-1]:.2%}")
            bar.set_postfix(steps_per_s=f"{rate:,.0f}", loss=f"{means[-1]:.3f}")
            bar.update()
    compiling = evaluator.compile_seconds + run_epoch.compile_seconds
    return Phase(
        state=state,
        accuracy_before=before,
        accuracy=accuracy,
        loss=loss,
        loss_window=window,
        steps_per_epoch=steps,
        compile_seconds=compiling,
        run_seconds=time.perf_counter() - start - compiling,
        optimizer_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)),
    )


class _Resident:
    """Epochs over arrays on the device, each one compiled program."""

    def __init__(self, step: Any, parallel: DataParallel, host: Any, state: TrainState, order: Any):
        def run(state: TrainState, arrays: Any, batches: Any) -> Any:
            return epoch_over_arrays(step, state, arrays, batches)

        self._parallel = parallel
        self._arrays = parallel.replicate(host)
        self._run = parallel.compile(run, state, self._arrays, parallel.split(order))
        self.compile_seconds = self._run.seconds

    def __call__(self, state: TrainState, order: Any) -> tuple[TrainState, np.ndarray]:
        state, metrics = self._run(state, self._arrays, self._parallel.split(order))
        return state, np.asarray(metrics["loss"])


class _Streamed:
    """Epochs over chunks cut on the host, one compiled program for each length of chunk."""

    def __init__(self, step: Any, parallel: DataParallel, host: Any):
        def run(state: TrainState, batches: Batch) -> Any:
            return epoch_over_batches(step, state, batches)

        self._fun, self._parallel, self._host = run, parallel, host
        self._compiled: dict[int, Compiled] = {}

    @property
    def compile_seconds(self) -> float:
        return sum(compiled.seconds for compiled in self._compiled.values())

    def __call__(self, state: TrainState, order: Any) -> tuple[TrainState, np.ndarray]:
        indices, weights = map(np.asarray, order)
        losses = []
        for chunk in prefetch(stream(self._host, indices, weights), self._parallel.split):
            length = len(chunk.weight)
            if length not in self._compiled:
                self._compiled[length] = self._parallel.compile(self._fun, state, chunk)
            state, metrics = self._compiled[length](state, chunk)
            losses.append(metrics["loss"])
        return state, np.concatenate([np.asarray(loss) for loss in losses])
