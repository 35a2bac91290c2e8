"""Training as pure functions: a state, a step, and an epoch that is one compiled program.

A step is ``(state, batch) -> (state, metrics)``. `epoch_over_arrays` repeats it over batches
gathered from arrays on the device, `epoch_over_batches` over a chunk of batches from anywhere, and
`evaluate` averages over a data set. `DataParallel` compiles each of them, with `jit` over a mesh of
devices or with `pmap`.

Every batch has the same size. What does not fill the last one has the weight 0, so a short batch is
exactly its own mean, needs no second compilation, and can be spread over any number of devices.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_lora.errors import ConfigError

DATA_AXIS = "data"
#: ``loss_fun(trained, frozen, batch) -> [batch_size]``: the loss of each example, in float32. With
#: a key in the state: ``loss_fun(trained, frozen, batch, key)``, another key in every step.
LossFun = Callable[..., jax.Array]
Metrics = dict[str, jax.Array]
#: ``metric_fun(trained, frozen, batch) -> {name: [batch_size]}``: metrics of each example.
MetricFun = Callable[[Any, Any, Any], Metrics]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes, and what it reads.

    Attributes:
        step: The number of steps done, an int32 scalar.
        trained: The tree that is differentiated: an adapter, or a model's parameters.
        frozen: The tree that is not: the base parameters beside an adapter, or ``None``.
        opt_state: The optimizer's state, over ``trained`` alone.
        key: The key of the run, a typed PRNG key, for a loss that is random, such as with dropout;
            otherwise ``None``.
    """

    step: jax.Array
    trained: Any
    frozen: Any
    opt_state: optax.OptState
    key: jax.Array | None = None

    @classmethod
    def create(
        cls,
        trained: Any,
        optimizer: optax.GradientTransformation,
        frozen: Any = None,
        key: jax.Array | None = None,
    ) -> TrainState:
        """A state at step 0 with a fresh optimizer."""
        return cls(jnp.zeros((), jnp.int32), trained, frozen, optimizer.init(trained), key)


class Batch(NamedTuple):
    """One batch of examples.

    Attributes:
        data: A pytree of arrays ``[batch_size, ...]``.
        weight: ``[batch_size]`` float32; 0 for padding, otherwise 1.
    """

    data: Any
    weight: jax.Array | np.ndarray


Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def train_step(
    loss_fun: LossFun, optimizer: optax.GradientTransformation, *, axis_name: str | None = None
) -> Step:
    """A training step ``(state, batch) -> (state, metrics)``, not yet compiled.

    The loss is ``sum(weight * loss_fun(...)) / sum(weight)`` over the whole batch, and only
    ``state.trained`` is differentiated. The key of a step is ``fold_in(state.key, state.step)``, so
    that a step is the same wherever a run was interrupted before it.

    Args:
        loss_fun: The loss of each example.
        optimizer: The optimizer whose state ``state.opt_state`` is.
        axis_name: The mapped axis over which the batch is split, under `jax.pmap`; sums then run
            over all devices, and each has a key of its own, ``fold_in(key, index)``. Not needed
            under `jit`, where the batch is one sharded array.

    Returns:
        The step; its metrics are ``{"loss": scalar}``.

    Raises:
        ConfigError: From the step: the loss is not one number for each example.
    """

    def total(x: Any) -> Any:
        return x if axis_name is None else jax.lax.psum(x, axis_name)

    def keys(state: TrainState) -> tuple[jax.Array, ...]:
        if state.key is None:
            return ()
        key = jax.random.fold_in(state.key, state.step)
        return (key if axis_name is None else _fold_in_index(key, axis_name),)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        examples = total(batch.weight.sum())

        def loss(trained: Any) -> jax.Array:
            losses = loss_fun(trained, state.frozen, batch.data, *keys(state))
            _check_one_each("the loss", losses, batch)
            return (batch.weight * losses).sum() / examples

        value, grads = jax.value_and_grad(loss)(state.trained)
        updates, opt_state = optimizer.update(total(grads), state.opt_state, state.trained)
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            trained=optax.apply_updates(state.trained, updates),
            opt_state=opt_state,
        )
        return state, {"loss": total(value)}

    return step


def _check_one_each(what: str, values: Any, batch: Batch) -> None:
    """That there is one number for each example; any other shape would broadcast, padding and all.

    Raises:
        ConfigError: There is not.
    """
    found = getattr(values, "shape", type(values).__name__)
    if found != batch.weight.shape:
        raise ConfigError(
            f"expected {what} of each example, of shape {batch.weight.shape}, got {found}; "
            "return it before any mean over the batch"
        )


def _fold_in_index(key: jax.Array, axis_name: str) -> jax.Array:
    return jax.random.fold_in(key, jax.lax.axis_index(axis_name))


def epoch_order(key: jax.Array, examples: int, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """A fresh shuffle as batches: ``(indices, weights)``, both ``[steps, batch_size]``.

    Each example is there once; the last batch is padded with index 0 at weight 0.
    """
    return _as_batches(jax.random.permutation(key, examples).astype(jnp.int32), batch_size)


def in_order(examples: int, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """Like `epoch_order`, in the order of the data: for evaluation."""
    return _as_batches(jnp.arange(examples, dtype=jnp.int32), batch_size)


def _as_batches(order: jax.Array, batch_size: int) -> tuple[jax.Array, jax.Array]:
    steps = -(-order.size // batch_size)
    padding = (0, steps * batch_size - order.size)
    weights = jnp.pad(jnp.ones(order.size, jnp.float32), padding)
    shape = (steps, batch_size)
    return jnp.pad(order, padding).reshape(shape), weights.reshape(shape)


def epoch_over_arrays(
    step: Step,
    state: TrainState,
    arrays: Any,
    batches: tuple[jax.Array, jax.Array],
    start: jax.Array | int = 0,
    stop: jax.Array | int | None = None,
) -> tuple[TrainState, Metrics]:
    """One epoch as one loop, gathering each batch from arrays on the device.

    Of an epoch that is done in parts, with ``start`` and ``stop`` as arguments of the compiled
    function, all parts run the same program: the result has the same bits wherever it was cut.

    Args:
        step: The training step.
        state: The state before.
        arrays: A pytree of arrays ``[examples, ...]``.
        batches: ``(indices, weights)`` as from `epoch_order`, ``[steps, batch_size]`` each.
        start: The first step to do, counted in the epoch.
        stop: The step to stop before; by default all are done.

    Returns:
        The state after, and the metrics of every step, ``[steps]`` each; zero for steps not done.
    """

    def batch(index: Any) -> Batch:
        return _gather(arrays, *_at(index, batches))

    steps = len(batches[0])
    return _loop(step, state, batch, steps, start, steps if stop is None else stop)


def epoch_over_batches(step: Step, state: TrainState, batches: Batch) -> tuple[TrainState, Metrics]:
    """A chunk of an epoch as one loop: for data that does not fit on the device.

    Args:
        step: The training step.
        state: The state before.
        batches: Batches with a leading axis of steps: ``[steps, batch_size, ...]``.

    Returns:
        The state after, and the metrics of every step, ``[steps]`` each.
    """
    steps = len(batches.weight)
    return _loop(step, state, lambda index: _at(index, batches), steps, 0, steps)


def _loop(
    step: Step,
    state: TrainState,
    batch: Callable[[Any], Batch],
    steps: int,
    start: jax.Array | int,
    stop: jax.Array | int,
) -> tuple[TrainState, Metrics]:
    """Steps ``start`` to ``stop`` of ``steps``, with the metrics of all."""
    # The frozen tree and the key are constants of the loop, not a part of what it carries.
    constant: dict[str, Any] = {"frozen": state.frozen, "key": state.key}
    nothing: dict[str, Any] = dict.fromkeys(constant)

    def one(state: TrainState, index: Any) -> tuple[TrainState, Metrics]:
        state, metrics = step(dataclasses.replace(state, **constant), batch(index))
        return dataclasses.replace(state, **nothing), metrics

    def body(index: Any, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        state, metrics = one(carry[0], index)
        return state, jax.tree.map(lambda kept, new: kept.at[index].set(new), carry[1], metrics)

    state = dataclasses.replace(state, **nothing)
    _, shapes = jax.eval_shape(one, state, jnp.int32(0))
    metrics = jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype), shapes)
    state, metrics = jax.lax.fori_loop(start, stop, body, (state, metrics))
    return dataclasses.replace(state, **constant), metrics


def evaluate(
    metric_fun: MetricFun,
    trained: Any,
    frozen: Any,
    arrays: Any,
    batches: tuple[jax.Array, jax.Array],
    *,
    axis_name: str | None = None,
) -> Metrics:
    """The mean of each metric over a data set, as one `lax.scan`.

    Args:
        metric_fun: The metrics of each example.
        trained: As in `TrainState`.
        frozen: As in `TrainState`.
        arrays: A pytree of arrays ``[examples, ...]``.
        batches: ``(indices, weights)`` as from `in_order`, ``[steps, batch_size]`` each.
        axis_name: As in `train_step`.

    Returns:
        A float32 scalar for each metric.

    Raises:
        ConfigError: A metric is not one number for each example.
    """

    def body(carry: None, xs: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[Any, jax.Array]]:
        batch = _gather(arrays, *xs)
        values = metric_fun(trained, frozen, batch.data)
        for name, value in values.items():
            _check_one_each(f"the metric {name!r}", value, batch)
        sums = jax.tree.map(lambda v: (v.astype(jnp.float32) * batch.weight).sum(), values)
        return None, (sums, batch.weight.sum())

    _, (sums, examples) = jax.lax.scan(body, None, batches)
    sums, examples = jax.tree.map(jnp.sum, (sums, examples))
    if axis_name is not None:
        sums, examples = jax.lax.psum((sums, examples), axis_name)
    return jax.tree.map(lambda v: v / examples, sums)


def _gather(arrays: Any, indices: jax.Array, weights: jax.Array) -> Batch:
    return Batch(_at(indices, arrays), weights)


def _at(index: Any, tree: Any) -> Any:
    # A numpy array would not take a traced index.
    return jax.tree.map(lambda array: jnp.asarray(array)[index], tree)


def stream(
    arrays: Any, indices: np.ndarray, weights: np.ndarray, steps_per_chunk: int = 256
) -> Iterator[Batch]:
    """Chunks of batches cut from arrays on the host, for `epoch_over_batches`.

    Only a chunk is in memory at a time beside ``arrays``, which may be memory-mapped files.

    Args:
        arrays: A pytree of host arrays ``[examples, ...]``.
        indices: ``[steps, batch_size]`` integers.
        weights: ``[steps, batch_size]`` float32.
        steps_per_chunk: Steps in a chunk; the last chunk may be shorter.

    Yields:
        Batches ``[steps, batch_size, ...]``.
    """
    for start in range(0, len(indices), steps_per_chunk):
        chunk = slice(start, start + steps_per_chunk)
        rows = jax.tree.map(lambda array, rows=indices[chunk]: array[rows], arrays)
        yield Batch(rows, weights[chunk])


def prefetch(chunks: Iterable[Any], put: Callable[[Any], Any]) -> Iterator[Any]:
    """Move each chunk to the device while the one before it is being computed."""
    waiting: list[Any] = []
    for chunk in chunks:
        waiting.append(put(chunk))
        if len(waiting) == 2:
            yield waiting.pop(0)
    yield from waiting


@dataclasses.dataclass(frozen=True)
class DataParallel:
    """Runs a function on several devices, each on its part of every batch.

    The function's last argument is a tree of batches ``[steps, batch_size, ...]``, split over the
    devices along the batch; all others, and the results, are the same on every device.

    Attributes:
        how: ``"jit"`` over a mesh of the devices, where the compiler splits the work and the
            function sees whole batches; or ``"pmap"``, where it sees one device's part and names
            the mapped axis `axis_name` in its sums.
        devices: The devices; all local ones by default.

    Example:
        >>> parallel = DataParallel("jit")
        >>> weights = parallel.split(jnp.ones((3, 8)))
        >>> total = parallel.compile(lambda scale, w: scale * w.sum(), jnp.float32(2), weights)
        >>> float(total(jnp.float32(2), weights))
        48.0
    """

    how: Literal["jit", "pmap"] = "jit"
    devices: tuple[jax.Device, ...] = dataclasses.field(
        default_factory=lambda: tuple(jax.local_devices())
    )

    def __post_init__(self) -> None:
        if self.how not in ("jit", "pmap"):
            raise ConfigError(f"expected 'jit' or 'pmap', got {self.how!r}")

    @property
    def axis_name(self) -> str | None:
        """What `train_step` and `evaluate` need as their ``axis_name``."""
        return DATA_AXIS if self.how == "pmap" else None

    def _sharding(self, *spec: str | None) -> NamedSharding:
        return NamedSharding(Mesh(np.array(self.devices), (DATA_AXIS,)), P(*spec))

    def replicate(self, tree: Any) -> Any:
        """Put a tree on every device."""
        return jax.device_put(tree, self._sharding())

    def split(self, batches: Any) -> Any:
        """Split arrays ``[steps, batch_size, ...]`` over the devices, along the batch.

        Raises:
            ConfigError: The batch size is not a multiple of the number of devices.
        """
        count = len(self.devices)
        sizes = {leaf.shape[1] for leaf in jax.tree.leaves(batches)}
        if any(size % count for size in sizes):
            raise ConfigError(
                f"expected a batch size that {count} devices can share, got {min(sizes)}; "
                f"use a multiple of {count} or fewer devices"
            )
        if self.how == "jit":
            return jax.device_put(batches, self._sharding(None, DATA_AXIS))
        parts = jax.tree.map(
            lambda x: x.reshape(x.shape[0], count, x.shape[1] // count, *x.shape[2:]), batches
        )
        return jax.device_put(parts, self._sharding(None, DATA_AXIS))

    def compile(self, fun: Callable[..., Any], *args: Any) -> Compiled:
        """Compile ``fun`` for arguments like these, the last one from `split`."""
        start = time.perf_counter()
        mapped: Any
        if self.how == "jit":
            mapped = jax.jit(fun, out_shardings=self._sharding())
        else:
            in_axes = (*[None] * (len(args) - 1), 1)
            mapped = jax.pmap(fun, DATA_AXIS, in_axes=in_axes, out_axes=None, devices=self.devices)
        args = (*map(self.replicate, args[:-1]), args[-1])
        executable = mapped.lower(*args).compile()
        return Compiled(executable, self, time.perf_counter() - start)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled function, to be called with arguments like those it was compiled for.

    Attributes:
        executable: What JAX compiled, with its ``cost_analysis`` and ``as_text``.
        parallel: Where its arguments go.
        seconds: How long tracing and compiling took.
    """

    executable: Any
    parallel: DataParallel
    seconds: float

    def __call__(self, *args: Any) -> Any:
        """Run it; the arguments go to the devices first."""
        return self.executable(*map(self.parallel.replicate, args[:-1]), args[-1])
