"""A sweep: trials sorted into programs, trained span by span, the worse ones stopped between."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jax_lora.adapter import Adapter
from jax_lora.config import LoraConfig
from jax_lora.errors import ConfigError, expect_callable, expect_type, near_misses
from jax_lora.plan import Plan
from jax_lora.plan import init as fresh
from jax_lora.sweep.group import Group, Log, Run, grouped
from jax_lora.sweep.program import MakeOptimizer, Task, example_batch
from jax_lora.sweep.results import TRAINING_LOSS, Results
from jax_lora.sweep.settings import Settings
from jax_lora.sweep.trials import Trial, check_trials
from jax_lora.training import LossFun, MetricFun

#: ``(key, params, plan) -> adapter``, as `jax_lora.init`.
Init = Callable[[jax.Array, Any, Plan], Adapter]


def _key_of(trial: Trial) -> jax.Array:
    return jax.random.key(trial.seed)


def run(
    trials: Sequence[Trial],
    loss_fun: LossFun,
    params: Any,
    train: Any,
    *,
    plan: Callable[[LoraConfig], Plan],
    optimizer: MakeOptimizer,
    settings: Settings,
    noisy: bool = False,
    metric_fun: MetricFun | None = None,
    test: Any = None,
    config: LoraConfig | None = None,
    init: Init = fresh,
    key: Callable[[Trial], jax.Array] = _key_of,
    order_key: jax.Array | None = None,
    devices: Sequence[jax.Device] | None = None,
    compiler_options: Mapping[str, Any] | None = None,
    log: Log | None = None,
) -> Results:
    """Train many adapters of the same parameters at once, and tell which is best.

    All trials whose adapters differ in their ranks and values alone are one program, in which every
    array of the adapter has a leading axis, and the parameters have none: smaller ranks are filled
    up with zeros, hyperparameters are arguments, and a step is `jax.vmap` of `training.train_step`.
    What else differs (a variant, an anchor, an optimizer chosen by name) makes several programs,
    one run after the other. Each outcome is that of its trial alone, but for the order in which
    products are summed.

    That holds for optimizers that move nothing without a gradient, as SGD, Adam, and weight decay
    do, and that measure an array by its norm, if at all. Of others, that average over an array's
    elements or add noise, set ``Settings.pad`` to 1.

    Args:
        trials: The trials, such as from `grid`.
        loss_fun: ``(adapter, params, batch) -> [batch_size]``: the loss of each example.
        params: The frozen parameters.
        train: A pytree of arrays ``[examples, ...]``, which go onto the devices.
        plan: From a configuration to its plan, such as ``lambda config: jl.plan(model.apply,
            params, x, config=config)``.
        optimizer: From a trial's hyperparameters to an optax transformation of what is trained,
            such as ``lambda trial: optax.sgd(trial.learning_rate)``. Numbers are traced scalars.
        settings: How long, how many at a time, and what decides.
        noisy: Whether the loss is random, such as with dropout, and takes a key as its last
            argument, another one in every step of every trial.
        metric_fun: ``(adapter, params, batch) -> {name: [batch_size]}``: metrics of each example.
        test: What they are measured on, like ``train``.
        config: What the trials have in common; the default otherwise.
        init: How an adapter starts, as `jax_lora.init`.
        key: The key of a trial; by default that of its seed. Its halves, from `jax.random.split`,
            are those of ``init`` and of the shuffles where each trial has its own order. Step ``n``
            of a noisy loss has ``fold_in(fold_in(second_half, 2**32 - 1), n)``.
        order_key: The key of the shuffles that trials share; ``jax.random.key(0)`` by default.
            Epoch ``k`` is shuffled by ``fold_in(order_key, k)``.
        devices: The devices that share the trials; all local ones by default.
        compiler_options: Options of the compiler, as of `jax.jit`.
        log: What takes a line about each epoch, such as ``print``.

    Returns:
        The outcomes.

    Raises:
        ConfigError: Trials, settings, losses or metrics that cannot mean anything; an optimizer
            that moves the zeros of smaller ranks, or others otherwise because of them.
        TargetError: From ``plan``.

    Example:
        >>> import jax.numpy as jnp, jax_lora as jl, optax
        >>> model = lambda params, x: x @ params["w"]
        >>> params, x = {"w": jnp.zeros((4, 2))}, jnp.eye(4)
        >>> data = {"x": x, "y": x @ jnp.ones((4, 2))}
        >>> adapted = jl.apply(model)
        >>> def loss(adapter, params, batch):
        ...     return ((adapted(params, adapter, batch["x"]) - batch["y"]) ** 2).sum(-1)
        >>> results = jl.sweep.run(
        ...     jl.sweep.grid(rank=(1, 2), learning_rate=(0.01, 0.03)), loss, params, data,
        ...     plan=lambda config: jl.plan(model, params, x, config=config),
        ...     optimizer=lambda trial: optax.sgd(trial.learning_rate),
        ...     settings=jl.sweep.Settings(epochs=20, batch_size=2))
        >>> results.best.trial.learning_rate, results.compilations
        (0.03, 1)

    References:
        Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
    """
    started = time.perf_counter()
    trials = check_trials(trials)
    expect_type("settings", settings, Settings)
    expect_callable("plan to be a function from a configuration to its plan", plan)
    expect_callable("optimizer to be a function from a trial to its optimizer", optimizer)
    expect_callable("loss_fun to be a function", loss_fun)
    devices = tuple(jax.local_devices() if devices is None else devices)
    task = Task(loss_fun, params, train, noisy, optimizer, metric_fun, test, compiler_options)
    task = task.placed(devices)
    runs = _runs(trials, LoraConfig() if config is None else config, params, plan, init, key)
    metric, mode = _decider(task, settings, runs[0].adapter)
    if settings.order == "own":
        order_key = None
    elif order_key is None:
        order_key = jax.random.key(0)
    groups = [
        Group(members, task, settings, devices, order_key, log)
        for members in grouped(runs, settings.pad)
    ]
    for first, last in settings.rungs:
        for group in groups:
            group.train(first, last)
        if last < settings.epochs:
            _stop_the_worse(runs, metric, mode, last, settings)
    compiling = sum(group.program.compile_seconds for group in groups)
    return Results(
        outcomes=tuple(run.outcome() for run in runs),
        metric=metric,
        mode=mode,
        epochs=settings.epochs,
        compilations=sum(group.program.compilations for group in groups),
        compile_seconds=compiling,
        run_seconds=time.perf_counter() - started - compiling,
        slot_epochs=sum(group.slot_epochs for group in groups),
    )


def _runs(
    trials: Sequence[Trial],
    base: LoraConfig,
    params: Any,
    plan: Callable[[LoraConfig], Plan],
    init: Init,
    key: Callable[[Trial], jax.Array],
) -> list[Run]:
    """The trials before the first step, each with the adapter that it has alone."""
    plans: dict[LoraConfig, Plan] = {}
    runs = []
    for trial in trials:
        config = trial.config(base)
        if config not in plans:
            plans[config] = plan(config)
        init_key, order_key = jax.random.split(key(trial))
        adapter = init(init_key, params, plans[config])
        runs.append(Run(trial, config, adapter, order_key))
    return runs


def _decider(task: Task, settings: Settings, adapter: Adapter) -> tuple[str, str]:
    """The metric that decides which trial is better, and whether the larger one or the smaller.

    Raises:
        ConfigError: There is no such metric, or there are several and none is named.
    """
    names = []
    if task.metric_fun is not None:
        if task.test is None:
            raise ConfigError("expected test examples for metric_fun, got none; set test=")
        batch = example_batch(task.test, (settings.evaluation_batch,))
        found = jax.eval_shape(task.metric_fun, adapter, task.params, batch)
        if not isinstance(found, dict):
            raise ConfigError(
                "expected metric_fun to return a dictionary of metrics by name, got "
                f"{type(found).__name__}"
            )
        names = list(found)
    if TRAINING_LOSS in names:
        raise ConfigError(f"expected metrics of other names than {TRAINING_LOSS!r}; rename it")
    metric = settings.metric
    if metric is None and len(names) > 1:
        raise ConfigError(
            f"expected the metric that decides, as there are {', '.join(names)}; set "
            "Settings.metric to one of them"
        )
    metric = metric or [*names, TRAINING_LOSS][0]
    if metric not in (*names, TRAINING_LOSS):
        near = near_misses(metric, (*names, TRAINING_LOSS))
        raise ConfigError(f"expected Settings.metric to be measured, got {metric!r} ({near})")
    return metric, "min" if metric == TRAINING_LOSS else settings.mode


def _stop_the_worse(
    runs: Sequence[Run], metric: str, mode: str, epoch: int, settings: Settings
) -> None:
    """Stop all but the better share of the runs that are still going on."""
    assert settings.halving is not None
    running = [run for run in runs if not run.stopped]
    sign = -1 if mode == "max" else 1

    def value(run: Run) -> float:
        last = run.loss[-1] if metric == TRAINING_LOSS else run.metrics[metric][-1]
        return sign * last if math.isfinite(last) else math.inf

    kept = math.ceil(len(running) * settings.halving.keep)
    for run in sorted(running, key=value)[kept:]:
        run.stopped = f"after epoch {epoch}"
