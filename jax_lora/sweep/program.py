"""What is compiled for the trials of one structure: an epoch and an evaluation of all of them."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_lora.adapter import Adapter
from jax_lora.errors import ConfigError
from jax_lora.optim import lora_optimizer
from jax_lora.sweep.products import Reordered, arranged, restored
from jax_lora.sweep.settings import Settings
from jax_lora.sweep.stacking import check_padding
from jax_lora.sweep.trials import CONFIGURED, Trial, is_number, unknown_name
from jax_lora.training import (
    Batch,
    LossFun,
    MetricFun,
    TrainState,
    epoch_order,
    epoch_over_arrays,
    evaluate,
    in_order,
    train_step,
)

TRIALS_AXIS = "trials"
#: A trial as the optimizer is made from it; see `Hyperparameters`.
MakeOptimizer = Callable[[Any], optax.GradientTransformation]


class Hyperparameters:
    """A trial as an optimizer sees it: its numbers are scalar arrays, traced where it is compiled.

    So one compiled program serves all of them: pass them on to optax, and do not branch on them.
    Strings, booleans and None are Python's, and trials that differ in them have programs of their
    own; of what only the adapter is made from, they can be used where all trials of a program
    agree.
    """

    def __init__(self, numbers: Mapping[str, Any], shared: Mapping[str, Any]):
        self._values = {**shared, **numbers}
        self._read: set[str] = set()

    @property
    def unread(self) -> frozenset[str]:
        """The names that nobody has asked for."""
        return frozenset(self._values) - self._read

    def __getattr__(self, name: str) -> Any:
        if name not in self._values:
            raise unknown_name(name, self._values)
        self._read.add(name)
        return self._values[name]

    __getitem__ = __getattr__


@dataclasses.dataclass(frozen=True)
class Task:
    """What all trials share.

    Attributes:
        loss_fun: The loss of each example.
        params: The frozen parameters.
        train: A pytree of arrays ``[examples, ...]``.
        noisy: Whether the loss takes a key.
        optimizer: From a trial's hyperparameters to its optimizer.
        metric_fun: Metrics of each example, or None.
        test: What they are measured on, a pytree like ``train``.
        compiler_options: As of `jax.jit`.
    """

    loss_fun: LossFun
    params: Any
    train: Any
    noisy: bool
    optimizer: MakeOptimizer
    metric_fun: MetricFun | None = None
    test: Any = None
    compiler_options: Mapping[str, Any] | None = None

    def placed(self, devices: Sequence[jax.Device]) -> Task:
        """The task with its arrays on every device."""
        arrays = jax.device_put((self.params, self.train, self.test), _sharding(devices))
        params, train, test = arrays
        return dataclasses.replace(self, params=params, train=train, test=test)


@dataclasses.dataclass(frozen=True)
class Slots:
    """The state of the trials that are trained at the same time, stacked.

    Attributes:
        numbers: The hyperparameters that are numbers, ``[slots]`` each.
        trained: The adapters.
        opt_state: The states of their optimizers.
        order_keys: The keys of their shuffles, ``[slots]``, or one for all of them.
        noise_keys: The keys of what is random in their losses, ``[slots]``, or None.
    """

    numbers: dict[str, jax.Array]
    trained: Adapter
    opt_state: Any
    order_keys: jax.Array
    noise_keys: jax.Array | None


class Program:
    """Trains and measures a number of trials at once.

    Args:
        task: What they share, placed on the devices.
        settings: How they are trained.
        trials: All that it is for.
        slots: The number of trials at once; a multiple of the number of devices.
        devices: The devices, which share the trials.
    """

    def __init__(
        self,
        task: Task,
        settings: Settings,
        trials: Sequence[Trial],
        slots: int,
        devices: Sequence[jax.Device],
    ):
        self.slots, self.compile_seconds, self.compilations = slots, 0.0, 0
        self._task, self._settings = task, settings
        self._shared = _shared_values(trials)
        self._dtypes = _dtypes(trials)
        self._shared_by_all = _sharding(devices)
        self._stacked = _sharding(devices, TRIALS_AXIS)
        self._stacked_in_steps = _sharding(devices, None, TRIALS_AXIS)
        self._examples = examples_in(task.train)
        self._compiled: dict[str, Any] = {}
        if task.metric_fun is not None:
            batches = in_order(examples_in(task.test), settings.evaluation_batch)
            self._test_batches = jax.device_put(batches, self._shared_by_all)

    def start(self, trial: Trial, adapter: Adapter) -> Any:
        """The state of a trial's optimizer before the first step."""
        return self._optimizer_of(trial).init(adapter)

    def check_names(self, trial: Trial) -> None:
        """That what a trial has no use for is no misspelt field of its configuration.

        Raises:
            ConfigError: Names what it may have been meant for.
        """
        values = Hyperparameters(self._numbers(trial), self._shared)
        self._task.optimizer(values)
        for name in sorted(values.unread - set(CONFIGURED)):
            if near := difflib.get_close_matches(name, CONFIGURED, n=1, cutoff=0.7):
                raise ConfigError(
                    f"{trial}: the optimizer does not use {name!r}, and it is no field of "
                    f"LoraConfig; did you mean {near[0]!r}?"
                )

    def check_padding(self, trial: Trial, adapter: Adapter, shapes: Adapter) -> None:
        """That a trial's optimizer does the same with the adapter filled up to some shapes.

        Raises:
            ConfigError: It does not.
        """
        check_padding(self._optimizer_of(trial), adapter, shapes)

    def load(
        self,
        trials: Sequence[Trial],
        adapters: Adapter,
        opt_state: Any,
        order_keys: jax.Array,
        noise_keys: jax.Array | None = None,
    ) -> Slots:
        """Put the state of some trials onto the devices, one in each slot.

        Args:
            trials: The trials.
            adapters: Their adapters, stacked.
            opt_state: The states of their optimizers, stacked.
            order_keys: The keys of their shuffles, or one for all of them.
            noise_keys: The keys of what is random in their losses, if anything is.
        """
        numbers = {
            name: np.asarray([trial[name] for trial in trials], dtype)
            for name, dtype in self._dtypes.items()
        }
        state = jax.device_put((numbers, adapters, opt_state, noise_keys), self._stacked)
        numbers, adapters, opt_state, noise_keys = state
        return Slots(numbers, adapters, opt_state, order_keys, noise_keys)

    def epoch(self, slots: Slots, number: int) -> tuple[Slots, np.ndarray]:
        """Train all trials for one epoch.

        Args:
            slots: The state before; its arrays are given up.
            number: Which epoch of each trial it is, from 0: its shuffle is that of
                ``fold_in(order_key, number)``.

        Returns:
            The state after, and the loss of every step, ``[steps, slots]``.
        """
        batches = _order(slots.order_keys, number, self._examples, self._settings.batch_size)
        own = slots.order_keys.ndim > 0
        batches = jax.device_put(batches, self._stacked_in_steps if own else self._shared_by_all)
        trained, opt_state, losses = self._call(
            "epoch",
            self._epoch,
            (self._stacked, self._stacked, self._stacked_in_steps),
            slots.trained,
            slots.opt_state,
            slots.numbers,
            slots.noise_keys,
            jnp.int32(number * len(batches[0])),
            self._task.params,
            self._task.train,
            batches,
            donate=(0, 1),
        )
        slots = dataclasses.replace(slots, trained=trained, opt_state=opt_state)
        return slots, np.asarray(losses)

    def measure(self, slots: Slots) -> dict[str, np.ndarray]:
        """The metrics of all trials on the test data, ``[slots]`` each."""
        metric_fun = self._task.metric_fun
        if metric_fun is None:
            return {}

        def run(trained: Adapter, params: Any, arrays: Any, batches: Any) -> Any:
            one = functools.partial(
                evaluate, metric_fun, frozen=params, arrays=arrays, batches=batches
            )
            return jax.vmap(one)(trained)

        arguments = slots.trained, self._task.params, self._task.test, self._test_batches
        found = self._call("measure", run, self._stacked, *arguments)
        return {name: np.asarray(values) for name, values in found.items()}

    def text(self, name: str = "epoch") -> str:
        """The compiled program, for counting what is in it."""
        return str(self._compiled[name].as_text())

    def _optimizer_of(self, trial: Trial) -> optax.GradientTransformation:
        return self._optimizer(self._numbers(trial))

    def _numbers(self, trial: Trial) -> dict[str, jax.Array]:
        return {name: jnp.asarray(trial[name], dtype) for name, dtype in self._dtypes.items()}

    def _optimizer(self, numbers: Mapping[str, jax.Array]) -> optax.GradientTransformation:
        return lora_optimizer(self._task.optimizer(Hyperparameters(numbers, self._shared)))

    def _epoch(
        self,
        trained: Adapter,
        opt_state: Any,
        numbers: dict[str, jax.Array],
        noise_keys: jax.Array | None,
        first: jax.Array,
        params: Any,
        arrays: Any,
        batches: tuple[jax.Array, jax.Array],
    ) -> tuple[Adapter, Any, jax.Array]:
        """An epoch of all trials: a loop over steps, each of which is one step of every trial."""

        def one(
            trained: Adapter, opt_state: Any, numbers: Any, key: Any, shared: Any, batch: Any
        ) -> tuple[Adapter, Any, jax.Array]:
            step = train_step(self._task.loss_fun, self._optimizer(numbers))
            number, params = shared
            state = TrainState(number, trained, params, opt_state, key)
            state, metrics = step(state, Batch(*batch))
            return state.trained, state.opt_state, metrics["loss"]

        own = 0 if batches[0].ndim == 3 else None
        shape = batches[0].shape[1:]
        batch = example_batch(arrays, shape), jax.ShapeDtypeStruct(shape, batches[1].dtype)
        stacked = jax.vmap(one, in_axes=(0, 0, 0, 0, None, own))
        every = Reordered(stacked, trained, opt_state, numbers, noise_keys, (first, params), batch)
        orders = every.orders

        def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
            trained, opt_state = restored((state.trained, state.opt_state), orders)
            shared = state.step, state.frozen
            outs = every(trained, opt_state, numbers, noise_keys, shared, tuple(batch))
            trained, opt_state = arranged(outs[:2], orders)
            state = TrainState(state.step + 1, trained, state.frozen, opt_state)
            return state, {"loss": outs[2]}

        kept = arranged((trained, opt_state), orders)
        state = TrainState(first, kept[0], params, kept[1])
        state, metrics = epoch_over_arrays(step, state, arrays, batches)
        return *restored((state.trained, state.opt_state), orders), metrics["loss"]

    def _call(
        self,
        name: str,
        fun: Callable[..., Any],
        shardings: Any,
        *args: Any,
        donate: tuple[int, ...] = (),
    ) -> Any:
        """Call a function, which is compiled the first time."""
        if name not in self._compiled:
            start = time.perf_counter()
            options = dict(self._task.compiler_options or {})
            jitted = jax.jit(
                fun, out_shardings=shardings, donate_argnums=donate, compiler_options=options
            )
            self._compiled[name] = jitted.lower(*args).compile()
            self.compile_seconds += time.perf_counter() - start
            self.compilations += 1
        return self._compiled[name](*args)


def _sharding(devices: Sequence[jax.Device], *spec: str | None) -> NamedSharding:
    return NamedSharding(Mesh(np.array(devices), (TRIALS_AXIS,)), P(*spec))


def _shared_values(trials: Sequence[Trial]) -> dict[str, Any]:
    """The hyperparameters that are no numbers and the same in all trials."""
    return {
        name: value
        for name, value in trials[0].hyperparameters.items()
        if not is_number(value) and all(trial[name] == value for trial in trials)
    }


def _dtypes(trials: Sequence[Trial]) -> dict[str, str]:
    """The dtypes of the hyperparameters that are numbers."""
    return {
        name: "int32" if all(_is_int32(trial[name]) for trial in trials) else "float32"
        for name, value in trials[0].hyperparameters.items()
        if is_number(value)
    }


def _is_int32(value: Any) -> bool:
    return isinstance(value, int) and -(2**31) <= value < 2**31


@functools.partial(jax.jit, static_argnums=(2, 3))
def _order(
    keys: jax.Array, number: Any, examples: int, batch_size: int
) -> tuple[jax.Array, jax.Array]:
    """The batches of an epoch, ``[steps, batch_size]`` or ``[steps, slots, batch_size]``."""

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return epoch_order(jax.random.fold_in(key, number), examples, batch_size)

    return jax.vmap(one, out_axes=1)(keys) if keys.ndim else one(keys)


def examples_in(arrays: Any) -> int:
    """The number of examples.

    Raises:
        ConfigError: The arrays do not have the same number of them.
    """
    counts = {leaf.shape[0] if getattr(leaf, "ndim", 0) else 0 for leaf in jax.tree.leaves(arrays)}
    if len(counts) != 1 or 0 in counts:
        raise ConfigError(
            "expected arrays with a leading axis of the same number of examples, got "
            f"{sorted(counts)}"
        )
    return int(counts.pop())


def example_batch(arrays: Any, shape: tuple[int, ...]) -> Any:
    """The shapes of some examples out of arrays ``[examples, ...]``."""
    return jax.tree.map(
        lambda array: jax.ShapeDtypeStruct((*shape, *array.shape[1:]), array.dtype), arrays
    )
