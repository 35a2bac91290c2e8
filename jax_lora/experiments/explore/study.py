"""What every part of the exploration starts from: a base, tasks of its images, and sweeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_lora as jl
from jax_lora.data import Dataset, Split
from jax_lora.experiments.fit import arrays_of, normalize
from jax_lora.experiments.options import DataOptions, LoraOptions, SgdOptions, sgd
from jax_lora.experiments.phases import predict_lora
from jax_lora.experiments.sweeping import key_of
from jax_lora.models import MLP
from jax_lora.sweep import Outcome, Results, Settings, Trial
from jax_lora.training import evaluate, in_order

KERNELS = ("**/kernel",)
_EVALUATION_BATCH = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explore(DataOptions, SgdOptions):
    """Measure the article's claims on a saved base, and write one report.

    Attributes:
        base: The checkpoint of the base.
        rank: The rank where only one is looked at.
        alpha: The alpha where only one is looked at.
        ranks: The ranks to compare.
        alphas: The alphas to compare.
        num_seeds: How many seeds, counted from --seed; the error bars are over these.
        quick: Only show that it runs: few small adapters of a small base of digits.
        out: A new folder for the report; by default below runs/.
    """

    base: Path = Path("checkpoints/cifar10-mlp/base")
    rank: int = LoraOptions.rank
    alpha: float = LoraOptions.alpha
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    alphas: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    num_seeds: int = 3
    quick: bool = False
    out: Path | None = None

    @property
    def seeds(self) -> range:
        """The seeds."""
        return range(self.seed, self.seed + self.num_seeds)


@dataclasses.dataclass(frozen=True)
class Task:
    """Images to be classified, made from a data set's.

    A model keeps its ten outputs: the probability of a group of classes is the sum of theirs.

    Attributes:
        name: What it is called.
        transform: From the images to those of the task, ``[n, height, width, channels]``.
        groups: The group of each class, from 0.
    """

    name: str
    transform: Callable[[np.ndarray], np.ndarray]
    groups: tuple[int, ...]

    def arrays(self, split: Split) -> dict[str, np.ndarray]:
        """A split's images and groups, as `losses` and `metrics` take them."""
        images = np.ascontiguousarray(self.transform(split.images))
        return arrays_of(Split(images, np.asarray(self.groups, np.int32)[split.labels]))

    def losses(self, logits: jax.Array, groups: jax.Array) -> jax.Array:
        """The cross-entropy of each example."""
        return optax.softmax_cross_entropy_with_integer_labels(self._scores(logits), groups)

    def correct(self, logits: jax.Array, groups: jax.Array) -> jax.Array:
        """Whether the most probable group is the right one."""
        return self._scores(logits).argmax(-1) == groups

    def _scores(self, logits: jax.Array) -> jax.Array:
        """The logit of each group: the logarithm of the sum of its classes' exponentials."""
        members = jax.nn.one_hot(jnp.array(self.groups), max(self.groups) + 1)
        return jax.nn.logsumexp(logits[..., None], axis=-2, b=members)


@dataclasses.dataclass(frozen=True)
class Study:
    """A base to adapt.

    Attributes:
        options: How it is adapted.
        model: The network.
        params: Its parameters.
        dataset: The data.
        compiler_options: As of `jax.jit`.
    """

    options: Explore
    model: MLP
    params: Any
    dataset: Dataset
    compiler_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def own_task(self) -> Task:
        """What the base was trained on."""
        classes = tuple(range(self.dataset.num_classes))
        return Task("as they are", lambda images: images, classes)

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """The shape of a batch."""
        features = int(np.prod(self.dataset.image_shape))
        return jax.ShapeDtypeStruct((self.options.batch_size, features), np.float32)

    def plan(self, config: jl.LoraConfig) -> jl.Plan:
        """What a configuration adapts."""
        return jl.plan(self.model.apply, self.params, self.example, config=config)

    def config(self, **changes: Any) -> jl.LoraConfig:
        """The article's, of the rank and alpha of the options."""
        options = LoraOptions(rank=self.options.rank, alpha=self.options.alpha)
        return dataclasses.replace(options.lora_config(), **changes)

    def loss_fun(self, task: Task) -> Callable[[Any, Any, Any], jax.Array]:
        """The loss of each example, for `jax_lora.sweep.run`."""
        predict = predict_lora(self.model)

        def losses(adapter: Any, params: Any, batch: Any) -> jax.Array:
            images = normalize(batch["image"], self.dataset.max_value)
            return task.losses(predict(adapter, params, images), batch["label"])

        return losses

    def metric_fun(self, task: Task) -> Callable[[Any, Any, Any], dict[str, jax.Array]]:
        """Accuracy and loss of each example."""
        predict = predict_lora(self.model)

        def metrics(adapter: Any, params: Any, batch: Any) -> dict[str, jax.Array]:
            images = normalize(batch["image"], self.dataset.max_value)
            logits, groups = predict(adapter, params, images), batch["label"]
            correct, losses = task.correct(logits, groups), task.losses(logits, groups)
            return {"accuracy": correct, "loss": losses}

        return metrics

    def train(self, trials: Sequence[Trial], task: Task, **changes: Any) -> Results:
        """A sweep. Every trial sees the shuffles of its seed, whatever it is trained beside.

        Args:
            trials: The trials. If they have one seed, they share their batches.
            task: What they learn.
            **changes: Settings, such as epochs, and arguments of `jax_lora.sweep.run`, such as
                init.
        """
        options, seeds = self.options, {trial.seed for trial in trials}
        settings = Settings(
            epochs=changes.pop("epochs", options.epochs),
            batch_size=options.batch_size,
            order="same" if len(seeds) == 1 else "own",
            pad=2.0,
            metric="accuracy",
        )
        return jl.sweep.run(
            trials,
            self.loss_fun(task),
            self.params,
            task.arrays(self.dataset.train),
            plan=self.plan,
            optimizer=lambda trial: sgd(
                options.learning_rate, options.momentum, options.weight_decay or None
            ),
            settings=settings,
            metric_fun=self.metric_fun(task),
            test=task.arrays(self.dataset.test),
            config=self.config(),
            key=key_of,
            order_key=jax.random.split(key_of(trials[0]))[1],
            compiler_options=self.compiler_options,
            log=print,
            **changes,
        )

    def tester(self, task: Task) -> Callable[[Any, Any], float]:
        """What gives the accuracy of an adapter on parameters, compiled once for each structure."""
        arrays = task.arrays(self.dataset.test)
        batches = in_order(len(arrays["label"]), min(_EVALUATION_BATCH, len(arrays["label"])))
        arrays, metric = jax.device_put(arrays), self.metric_fun(task)
        run = jax.jit(
            lambda adapter, params, arrays, batches: evaluate(
                metric, adapter, params, arrays, batches
            )["accuracy"],
            compiler_options=dict(self.compiler_options),
        )
        return lambda adapter, params: float(run(adapter, params, arrays, batches))


def run_of(outcome: Outcome) -> dict[str, Any]:
    """What became of a trial, as JSON-able data."""
    return {
        "seed": outcome.trial.seed,
        "accuracy": list(outcome.metrics["accuracy"]),
        "test_loss": list(outcome.metrics["loss"]),
        "loss": list(outcome.loss),
    }
