"""A sweep over the second half of the article's experiment: many adapters of one base."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import jax_lora as jl
from jax_lora import report
from jax_lora.data import Dataset
from jax_lora.experiments import environment
from jax_lora.experiments.article import new_folder
from jax_lora.experiments.fit import arrays_of, correct_of, losses_of
from jax_lora.experiments.options import DataOptions, LoraOptions, SgdOptions, describe, sgd
from jax_lora.experiments.phases import (
    check_dataset,
    load_base,
    load_data,
    plan_lora,
    predict_lora,
    predict_noisy,
)
from jax_lora.models import MLP
from jax_lora.rules import Init
from jax_lora.sweep import Halving, Results, Settings, Trial, grid

TABLE, RESULTS, BEST = "table.txt", "sweep.json", "best"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(LoraOptions, DataOptions, SgdOptions):
    """Train many adapters of a saved base at once, print a table, and save the best.

    Attributes:
        base: The checkpoint of the base.
        ranks: The ranks to try; by default --rank alone.
        alphas: The alphas to try; by default --alpha alone.
        learning_rates: The learning rates to try; by default --learning-rate alone.
        weight_decays: The weight decays to try; by default --weight-decay alone.
        inits: The starts to try; by default --init alone.
        variants: The variants to try.
        num_seeds: How many seeds to try, counted from --seed.
        order: Whether all trials see the same batches, which shares the base's work, or each its
            own, as it would alone.
        slots: How many trials are trained at the same time; by default all of a program.
        pad: The size of the largest adapter of a program as a multiple of its smallest.
        halve_after: Epochs after which the worse half of the trials stops.
        out: A new folder for the table, JSON, plots and best adapter; by default below runs/.
    """

    base: Path = Path("checkpoints/cifar10-mlp/base")
    ranks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    learning_rates: tuple[float, ...] = ()
    weight_decays: tuple[float, ...] = ()
    inits: tuple[Init, ...] = ()
    variants: tuple[str, ...] = ("lora",)
    num_seeds: int = 3
    order: Literal["same", "own"] = "same"
    slots: int | None = None
    pad: float = 2.0
    halve_after: tuple[int, ...] = ()
    out: Path | None = None

    def trials(self) -> tuple[Trial, ...]:
        """All combinations.

        Raises:
            ConfigError: A value that cannot mean anything, or one that is there twice.
        """
        return grid(
            variant=self.variants,
            init=self.inits or (self.init,),
            rank=self.ranks or (self.rank,),
            alpha=self.alphas or (self.alpha,),
            learning_rate=self.learning_rates or (self.learning_rate,),
            weight_decay=self.weight_decays or (self.weight_decay,),
            seed=range(self.seed, self.seed + self.num_seeds),
        )

    def settings(self) -> Settings:
        """How they are trained.

        Raises:
            ConfigError: A value that cannot mean anything.
        """
        return Settings(
            epochs=self.epochs,
            batch_size=self.batch_size,
            order=self.order,
            slots=self.slots,
            pad=self.pad,
            halving=Halving(self.halve_after) if self.halve_after else None,
            metric="accuracy",
        )


def key_of(trial: Trial) -> jax.Array:
    """The key of a trial: that of fine-tuning with its seed in `jax_lora.experiments.phases`."""
    return jax.random.fold_in(jax.random.key(trial.seed), 1)


def sweep(options: Sweep, model: MLP, params: Any, dataset: Dataset, **settings: Any) -> Results:
    """Train all trials of the options.

    With ``order="own"`` each is what `jax_lora.experiments.phases.finetune` gives for its values.

    Args:
        options: The trials, and how they are trained.
        model: The network.
        params: Its parameters.
        dataset: The data.
        **settings: Further arguments of `jax_lora.sweep.run`.
    """
    example = jax.ShapeDtypeStruct((1, int(np.prod(dataset.image_shape))), np.float32)
    decays = any(options.weight_decays or (options.weight_decay,))

    def plan(config: jl.LoraConfig) -> jl.Plan:
        return jl.plan(model.apply, params, example, config=config)

    def optimizer(trial: Any) -> Any:
        decay = trial.weight_decay if decays else None
        return sgd(trial.learning_rate, options.momentum, decay)

    predict: Any = predict_lora(model)
    if options.dropout:
        predict = predict_noisy(model, plan_lora(options, model, params, dataset).dropout)
    return jl.sweep.run(
        options.trials(),
        losses_of(predict, dataset.max_value),
        params,
        arrays_of(dataset.train),
        plan=plan,
        optimizer=optimizer,
        settings=options.settings(),
        noisy=bool(options.dropout),
        metric_fun=correct_of(predict_lora(model), dataset.max_value),
        test=arrays_of(dataset.test),
        config=options.lora_config(),
        key=key_of,
        order_key=jax.random.split(key_of(Trial(seed=options.seed)))[1],
        **settings,
    )


def run_sweep(options: Sweep) -> Results:
    """Restore a base, train all trials, print and write what they came to."""
    out = new_folder(options.out, "sweep")
    trials, _ = options.trials(), options.settings()  # refuse bad values first
    model, params, metadata = load_base(options.base)
    dataset = load_data(options)
    check_dataset(metadata, dataset, options.base)
    print(f"data: {dataset.source}; {len(trials)} trials")
    out.mkdir(parents=True, exist_ok=True)
    results = sweep(options, model, params, dataset, log=print)
    print(results)
    (out / TABLE).write_text(f"{results}\n", encoding="utf-8")
    document = {
        "command": shlex.join(["python", *sys.argv]),
        "dataset": dataset.name,
        "config": describe(options),
        **results.to_json(),
        "versions": environment.versions(),
        "hardware": environment.hardware(),
    }
    report.write_json(document, out / RESULTS)
    report.write_sweep_plots(document, out)
    results.best.save(out / BEST, base=params)
    accuracy = results.best.final("accuracy")
    print(f"best: {results.best.trial}, {accuracy:.2%} on the test split; saved in {out / BEST}")
    return results
