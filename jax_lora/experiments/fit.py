"""One phase of training: some epochs, each followed by an evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from jax_lora.data import Dataset, Split
from jax_lora.errors import ConfigError, JaxLoraError
from jax_lora.experiments.epochs import Epochs, Resident, Streamed, order_of
from jax_lora.experiments.options import TrainOptions
from jax_lora.experiments.saving import History, Progress, Saver, Saving
from jax_lora.training import DataParallel, TrainState, evaluate, in_order, train_step

#: ``predict(trained, frozen, images) -> logits``, for images scaled to [-1, 1].
Predict = Callable[[Any, Any, jax.Array], jax.Array]
#: The same in training, if that is random: ``predict(trained, frozen, images, key) -> logits``.
NoisyPredict = Callable[[Any, Any, jax.Array, jax.Array], jax.Array]
#: Called with the steps ``start`` to ``stop``, counted from the first epoch, before they are done.
Watch = Callable[[int, int], None]
_EVALUATION_BATCH = 1000
#: No epoch has this number, so that no shuffle has the key of the noise.
_NOISE = 2**32 - 1


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
        resumed_at: The numbers of steps done where it went on after interruptions.
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
    resumed_at: list[int] = dataclasses.field(default_factory=list)


def losses_of(predict: Predict | NoisyPredict, max_value: int) -> Callable[..., jax.Array]:
    """The cross-entropy of each example, for batches ``{"image": uint8, "label": int32}``."""

    def loss_fun(trained: Any, frozen: Any, batch: Any, *key: jax.Array) -> jax.Array:
        logits = predict(trained, frozen, normalize(batch["image"], max_value), *key)
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
    *,
    noisy: NoisyPredict | None = None,
    saving: Saving | None = None,
    watch: Watch | None = None,
) -> Phase:
    """Train ``trained`` for ``options.epochs`` epochs, evaluating on the test split after each.

    Args:
        predict: The model.
        trained: The tree to train.
        frozen: The tree that stays as it is.
        optimizer: A fresh optimizer for ``trained``.
        dataset: The data.
        options: How to train.
        key: The key of all that is random. The shuffle of epoch ``k`` has ``fold_in(key, k)``, step
            ``n`` of ``noisy`` has ``fold_in(fold_in(key, 2**32 - 1), n)``.
        title: What the progress bar says.
        noisy: The model in training, if that is random, such as with dropout.
        saving: Where training checkpoints are written, and whether to go on from there.
        watch: Told of steps before they are done, for tests.

    Returns:
        The state and the measurements, those before an interruption included.

    Raises:
        ConfigError: More devices than there are, or a batch size that they cannot share; or
            training checkpoints that do not go with the options.
        CheckpointError: A training checkpoint cannot be written or read, or is of another run.
        JaxLoraError: The loss stopped being finite.
    """
    start = time.perf_counter()
    parallel = data_parallel(options)
    losses = losses_of(noisy or predict, dataset.max_value)
    step = train_step(losses, optimizer, axis_name=parallel.axis_name)
    host = arrays_of(dataset.train)
    examples = len(dataset.train)
    steps = -(-examples // options.batch_size)
    window = 500 if steps >= 500 else max(1, steps // 3)

    def order(epoch: int) -> tuple[jax.Array, jax.Array]:
        return order_of(progress.key, epoch, examples, options.batch_size)

    with contextlib.ExitStack() as stack:
        progress = Progress(TrainState.create(trained, optimizer, frozen), key, History(window))
        saver = None
        if saving is not None:
            saver = stack.enter_context(Saver(saving, frozen, options, examples))
            progress = saver.resume(progress)
        if noisy is not None:
            noise = jax.random.fold_in(progress.key, _NOISE)
            progress.state = dataclasses.replace(progress.state, key=noise)
        epochs: Epochs
        if options.stream:
            epochs = Streamed(step, parallel, host)
        else:
            epochs = Resident(step, parallel, host, progress.state, order(0))
        evaluator = Evaluator(predict, dataset.test, dataset.max_value, parallel, trained, frozen)
        history, seconds_before = progress.history, progress.history.seconds

        def tick() -> None:
            compiling = evaluator.compile_seconds + epochs.compile_seconds
            history.seconds = seconds_before + time.perf_counter() - start - compiling

        if progress.at_start:
            history.accuracy_before = evaluator(trained, frozen)
        bar = tqdm(
            total=options.epochs, initial=progress.epoch, desc=title, unit="epoch", disable=None
        )
        stack.enter_context(bar)
        while progress.epoch < options.epochs:
            began, first = time.perf_counter(), progress.step
            for _ in _parts(progress, epochs, order(progress.epoch), saver, watch):
                tick()
                if saver is not None and progress.step < steps:
                    saver.save(progress)
            rate = (steps - first) / (time.perf_counter() - began)
            accuracy = evaluator(progress.state.trained, frozen)
            progress.end_epoch(accuracy)
            tick()
            if saver is not None:
                saver.save(progress, {"accuracy": accuracy, "loss": history.loss[-1]})
            means = history.loss[-(steps // window) :]
            shown = " ".join(f"{mean:.3f}" for mean in means)
            bar.write(f"[{title}, epoch {progress.epoch}] loss: {shown}  accuracy: {accuracy:.2%}")
            bar.set_postfix(steps_per_s=f"{rate:,.0f}", loss=f"{means[-1]:.3f}")
            bar.update()
    return Phase(
        state=progress.state,
        accuracy_before=history.accuracy_before,
        accuracy=history.accuracy,
        loss=history.loss,
        loss_window=window,
        steps_per_epoch=steps,
        compile_seconds=evaluator.compile_seconds + epochs.compile_seconds,
        run_seconds=history.seconds,
        optimizer_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(progress.state.opt_state)),
        resumed_at=history.resumed_at,
    )


def _parts(
    progress: Progress, epochs: Epochs, order: Any, saver: Saver | None, watch: Watch | None
) -> Iterator[None]:
    """Do the rest of an epoch: at once, or in parts after which it is asked whether to save."""
    steps = len(order[0])
    before = progress.epoch * steps
    placed = epochs.place(order)
    while (done := progress.step) < steps:
        wanted = steps if saver is None else saver.next_stop(before + done) - before
        stop = min(steps, -(-wanted // epochs.grain) * epochs.grain)
        if watch is not None:
            watch(before + done, before + stop)
        progress.state, losses = epochs(progress.state, placed, done, stop)
        if not np.isfinite(losses).all():
            index = int(np.argmin(np.isfinite(losses)))
            raise JaxLoraError(
                f"expected a finite loss, got {losses[index]} at step {done + index + 1} of epoch "
                f"{progress.epoch + 1}; lower --learning-rate or --alpha"
            )
        progress.advance(stop, losses)
        yield
