"""From options to the report: all parts, one after the other."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax_lora as jl
from jax_lora import report
from jax_lora.experiments import environment
from jax_lora.experiments.article import Pretrain, new_folder
from jax_lora.experiments.explore import accuracy, cost, pages, spectra, switching
from jax_lora.experiments.explore.study import Explore, Study
from jax_lora.experiments.options import describe
from jax_lora.experiments.phases import check_dataset, load_base, load_data, pretrain
from jax_lora.experiments.seeds import PLACES

RESULTS = "results.json"
#: What ``--quick`` changes; its base is trained on the spot.
_QUICK: dict[str, Any] = {
    "dataset": "digits",
    "epochs": 2,
    "learning_rate": 0.02,
    "rank": 2,
    "ranks": (1, 2),
    "alphas": (0.5, 1.0),
    "num_seeds": 2,
}
_QUICK_HIDDEN = 8
_QUICK_COMPILER = {"xla_backend_optimization_level": 0}


def run_explore(options: Explore) -> dict[str, Any]:
    """Measure everything and write the report; returns what ``results.json`` holds."""
    start = time.perf_counter()
    out = new_folder(options.out, "explore")
    study = _study(options)
    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        print(f"{name} ...", flush=True)
        began = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - began

    with timed("ranks, alphas and dense models"):
        learned, outcomes = accuracy.measure(study)
    with timed("spectra"):
        found = spectra.measure(study, outcomes)
    with timed("bytes"):
        counted = cost.measure(study)
    with timed("tasks and switching"):
        switched = switching.measure(study)
    with timed("base"):
        base_accuracy = study.tester(study.own_task)(jl.Adapter({}), study.params)
    results = {
        "dataset": {"cifar10": "CIFAR-10"}.get(study.dataset.name, study.dataset.name),
        # Without the folder, which says nothing to the reader of the numbers.
        "dataset_source": study.dataset.source.partition(" at ")[0],
        "command": shlex.join(["python", *sys.argv]),
        "config": {k: v for k, v in describe(study.options).items() if k not in PLACES},
        "base_accuracy": base_accuracy,
        "accuracy": learned,
        "spectra": found,
        "cost": counted,
        "switching": switched,
        "trainings": len({id(outcome) for outcome in outcomes.values()})
        + sum(len(dense["runs"]) for dense in learned["dense"])
        + sum(map(len, switched["runs"].values())),
        "seconds": seconds | {"all": time.perf_counter() - start},
        "versions": environment.versions(),
        "hardware": environment.hardware(),
    }
    report.write_json(results, out / RESULTS)
    path = pages.write_pages(results, out)
    print(f"see {path}")
    return results


def _study(options: Explore) -> Study:
    """The base and the data that the options name."""
    if options.quick:
        options = dataclasses.replace(options, **_QUICK)
        dataset = load_data(options)
        names = ("dataset", "seed", "epochs", "learning_rate")
        like = {name: getattr(options, name) for name in names}
        model, phase = pretrain(Pretrain(**like, hidden_dim=_QUICK_HIDDEN), dataset)
        return Study(options, model, phase.state.trained, dataset, _QUICK_COMPILER)
    model, params, metadata = load_base(options.base)
    dataset = load_data(options)
    check_dataset(metadata, dataset, options.base)
    return Study(options, model, params, dataset)
