"""The experiment over several seeds, beside the article's numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jax_lora import report
from jax_lora.errors import ConfigError
from jax_lora.experiments import environment
from jax_lora.experiments.article import Experiment
from jax_lora.experiments.article_values import ARTICLE
from jax_lora.experiments.options import describe
from jax_lora.experiments.phases import check_lora, finetune, load_data, pretrain

#: Options that name places on one machine, and say nothing to the reader of the numbers.
PLACES = {"out", "data_dir", "archive", "cache_dir"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seeds(Experiment):
    """Run the article's experiment with several seeds and print a table.

    Attributes:
        num_seeds: How many seeds, counted from --seed.
        out: A JSON file for the numbers.
    """

    num_seeds: int = 5
    out: Path | None = None


def run_seeds(options: Seeds) -> dict[str, Any]:
    """Run all seeds; print the table and return what the JSON file holds."""
    last = options.seed + options.num_seeds - 1
    if last >= 2**32:
        raise ConfigError(f"expected the last seed below 2**32, got {last}; lower --seed")
    if options.out is not None and options.out.exists():
        raise ConfigError(f"expected --out to be a new file, but {options.out} exists")
    dataset = load_data(options)
    check_lora(options, dataset)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in range(options.seed, options.seed + options.num_seeds):
        seeded = dataclasses.replace(options, seed=seed)
        model, base = pretrain(seeded, dataset)
        _, lora = finetune(seeded, model, base.state.trained, dataset)
        runs.append(
            {
                "seed": seed,
                **{
                    name: {"accuracy": phase.accuracy, "loss": phase.loss}
                    for name, phase in (("base", base), ("lora", lora))
                },
            }
        )
    results = {
        "dataset": dataset.name,
        "config": {k: v for k, v in describe(options).items() if k not in PLACES},
        "runs": runs,
        "versions": environment.versions(),
        "hardware": environment.hardware(),
    }
    print(table(results))
    if options.out is not None:
        report.write_json(results, options.out)
    return results


def table(results: dict[str, Any]) -> str:
    """Mean, least and largest accuracy of each epoch as a Markdown table, beside the article's."""
    compare = results["dataset"] == "cifar10"
    head = f"| phase | epoch | mean of {len(results['runs'])} seeds | least | largest |"
    lines = [head + (" article | difference |" if compare else "")]
    lines.append("|" + " --- |" * (lines[0].count("|") - 1))
    for phase, name in (("base", "base"), ("lora", "LoRA")):
        accuracies = np.array([run[phase]["accuracy"] for run in results["runs"]]) * 100
        for epoch, column in enumerate(accuracies.T):
            mean = column.mean()
            row = (
                f"| {name} | {epoch + 1} | {mean:.2f} % | {column.min():.2f} | {column.max():.2f} |"
            )
            if compare and epoch < len(ARTICLE[phase]["accuracy"]):
                article = 100 * ARTICLE[phase]["accuracy"][epoch]
                row += f" {article:.0f} % | {mean - article:+.2f} |"
            lines.append(row)
    return "\n".join(lines)
