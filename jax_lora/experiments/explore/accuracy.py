"""LoRA of every rank and alpha beside full fine-tuning, the head alone, and small dense models."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import jax_lora as jl
from jax_lora.experiments.explore.study import KERNELS, Study, run_of
from jax_lora.models import MLP
from jax_lora.sweep import Outcome, Trial

#: A trial that trains parameters whole, from where they are.
WHOLE: dict[str, Any] = {"variant": "full", "init": jl.LoraConfig.init}
#: By ``(method, value, seed)``, such as ``("rank", 8, 0)`` or ``("full", None, 0)``.
Outcomes = dict[tuple[str, Any, int], Outcome]


def measure(study: Study) -> tuple[dict[str, Any], Outcomes]:
    """All methods at equal steps: what each came to, and the adapters."""
    options = study.options
    outcomes: Outcomes = {}
    for seed in options.seeds:
        named = dict(_trials(study, seed))
        results = study.train(list(dict.fromkeys(named.values())), study.own_task)
        by_trial = {outcome.trial: outcome for outcome in results}
        outcomes |= {(*name, seed): by_trial[trial] for name, trial in named.items()}

    def runs(method: str, value: Any = None) -> dict[str, Any]:
        found = [outcomes[method, value, seed] for seed in options.seeds]
        return {
            "params": found[0].adapter.trainable_params,
            "runs": [run_of(outcome) for outcome in found],
        }

    section = {
        "rank": [{"rank": rank, **runs("rank", rank)} for rank in options.ranks],
        "alpha": [{"alpha": alpha, **runs("alpha", alpha)} for alpha in options.alphas],
        "full": runs("full"),
        "head": runs("head"),
        "dense": [{"rank": rank, **_dense(study, rank)} for rank in options.ranks],
    }
    return section, outcomes


def _trials(study: Study, seed: int) -> Iterator[tuple[tuple[str, Any], Trial]]:
    """The trials of a seed, by method and value."""
    options = study.options
    lora: dict[str, Any] = {"seed": seed, "targets": KERNELS, "variant": "lora", "init": "article"}
    for rank in options.ranks:
        yield ("rank", rank), Trial(rank=rank, alpha=options.alpha, **lora)
    for alpha in options.alphas:
        yield ("alpha", alpha), Trial(rank=options.rank, alpha=alpha, **lora)
    # There is no rank and no alpha, but all trials of a sweep have the same names.
    whole: dict[str, Any] = {"seed": seed, **WHOLE, "rank": 1, "alpha": 1.0}
    yield ("full", None), Trial(targets=("**",), **whole)
    yield ("head", None), Trial(targets=(f"**/l{len(study.model.features)}/*",), **whole)


def _dense(study: Study, rank: int) -> dict[str, Any]:
    """A dense model with as many parameters as LoRA trains, from scratch.

    It is trained twice as long: as many steps as base and adapter together.
    """
    features = study.model.features
    inputs, outputs = study.example.shape[1], features[-1]
    adapter = jax.eval_shape(
        lambda: jl.init(jax.random.key(0), study.params, study.plan(study.config(rank=rank)))
    )
    width = dense_width(adapter.trainable_params, inputs, outputs, len(features) - 1)
    model = MLP((*[width] * (len(features) - 1), outputs))
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(model.init, jax.random.key(0), study.example),
    )

    def fresh(key: jax.Array, params: Any, plan: jl.Plan) -> jl.Adapter:
        """All parameters trained whole, from the model's own start."""
        start = model.init(key, jnp.zeros(study.example.shape, study.example.dtype))
        return jl.init(key, start, plan)

    trials = [Trial(seed=seed, targets=("**",), **WHOLE) for seed in study.options.seeds]
    small = dataclasses.replace(study, model=model, params=zeros)
    results = small.train(trials, study.own_task, epochs=2 * study.options.epochs, init=fresh)
    params = results[0].adapter.trainable_params
    return {"width": width, "params": params, "runs": [run_of(outcome) for outcome in results]}


def dense_width(params: int, inputs: int, outputs: int, hidden: int) -> int:
    """The width of all hidden layers with which a dense model has about so many parameters.

    Example:
        >>> dense_width(411_146, inputs=3072, outputs=10, hidden=2)
        128
    """

    def count(width: int) -> int:
        sizes = [inputs, *[width] * hidden, outputs]
        return sum((n + 1) * m for n, m in itertools.pairwise(sizes))

    width = 1
    while abs(count(width + 1) - params) < abs(count(width) - params):
        width += 1
    return width
