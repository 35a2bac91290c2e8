"""Whether each claim held: a criterion that was there before the numbers, and what they are."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax_lora.experiments.explore.spectra import rank_of_energy

Results = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A claim and what became of it.

    Attributes:
        claim: What is said.
        source: Who says it.
        criterion: When it holds.
        found: The numbers.
        held: Whether it does.
    """

    claim: str
    source: str
    criterion: str
    found: str
    held: bool


def verdicts(results: Results) -> list[Verdict]:
    """All claims, in the order of the report's sections."""
    return [
        *_learning(results),
        *_ranks(results),
        *_intrinsic_rank(results),
        *_subspaces(results),
        *_memory(results),
        *_switching(results),
    ]


def finals(runs: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """The last value of each run."""
    return [run[name][-1] for run in runs]


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the standard deviation, which is 0 of one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def spread(values: Sequence[float], scale: float = 1.0, spec: str = ".2f") -> str:
    """The mean ± the standard deviation."""
    mean, sd = mean_sd(values)
    return f"{scale * mean:{spec}} ± {scale * sd:{spec}}"


def of_rank(results: Results, rank: int) -> Mapping[str, Any]:
    """LoRA of a rank."""
    return next(row for row in results["accuracy"]["rank"] if row["rank"] == rank)


def _learning(results: Results) -> Iterator[Verdict]:
    options, accuracy = results["config"], results["accuracy"]
    runs = of_rank(results, options["rank"])["runs"]
    before, after = runs[0]["accuracy"][0], finals(runs, "accuracy")
    losses = [(run["loss"][0], run["loss"][-1]) for run in runs]
    yield Verdict(
        "Fine-tuning with LoRA goes on improving the model.",
        "article",
        "in every seed the training loss falls and the test accuracy rises",
        f"rank {options['rank']}: accuracy {100 * before:.2f} % to {spread(after, 100)} %, loss "
        f"{spread([a for a, _ in losses], spec='.3f')} in the first epoch, "
        f"{spread([b for _, b in losses], spec='.3f')} in the last",
        all(a > b for a, b in losses) and min(after) > before,
    )
    rows = accuracy["alpha"]
    means = [mean_sd(finals(row["runs"], "accuracy")) for row in rows]
    best, worst = (f(range(len(rows)), key=lambda k: means[k][0]) for f in (max, min))
    apart = means[best][0] - means[worst][0]
    noise = 2 * max(sd for _, sd in means)
    yield Verdict(
        "Alpha modulates what LoRA contributes.",
        "article",
        "the best and the worst alpha are further apart than two standard deviations of any",
        f"alpha {rows[best]['alpha']:g}: {100 * means[best][0]:.2f} %, alpha "
        f"{rows[worst]['alpha']:g}: {100 * means[worst][0]:.2f} %, {100 * apart:.2f} points apart "
        f"with two standard deviations of {100 * noise:.2f}",
        apart > noise,
    )
    rows = accuracy["dense"]
    wins = [
        row["rank"]
        for row in rows
        if min(finals(of_rank(results, row["rank"])["runs"], "accuracy"))
        > max(finals(row["runs"], "accuracy"))
    ]
    yield Verdict(
        "LoRA gets more out of its parameters than a dense model of as many.",
        "implied",
        "at every rank the worst seed of LoRA beats the best of the dense model from scratch, "
        "which was trained for as many steps as base and adapter together",
        f"so at the ranks {', '.join(map(str, wins)) or 'none'} of "
        f"{', '.join(str(row['rank']) for row in rows)}",
        len(wins) == len(rows),
    )


def _ranks(results: Results) -> Iterator[Verdict]:
    rows, full = results["accuracy"]["rank"], results["accuracy"]["full"]["runs"]
    target = mean_sd(finals(full, "loss"))[0]
    gaps = [mean_sd(finals(row["runs"], "loss"))[0] - target for row in rows]
    low, high = rows[0]["rank"], rows[-1]["rank"]
    yield Verdict(
        "A higher rank more closely approximates full fine-tuning: in its training loss.",
        "article",
        "the distance from the loss of full fine-tuning shrinks with every rank, and to less than "
        "half from the smallest to the largest",
        f"{gaps[0]:+.4f} at rank {low}, {gaps[-1]:+.4f} at rank {high}, full fine-tuning "
        f"{target:.4f}",
        _falls([abs(gap) for gap in gaps]),
    )
    distances = [statistics.fmean(row["distance"]) for row in results["spectra"]["distances"]]
    yield Verdict(
        "A higher rank more closely approximates full fine-tuning: in the weights.",
        "article",
        "|dW - dW_full| / |dW_full| shrinks with every rank, and to less than half from the "
        "smallest to the largest; 1 is as far as no update",
        f"{distances[0]:.3f} at rank {low}, {distances[-1]:.3f} at rank {high}",
        _falls(distances),
    )
    accuracies = [mean_sd(finals(row["runs"], "accuracy")) for row in rows]
    best, noise = mean_sd(finals(full, "accuracy"))
    enough = [
        row["rank"]
        for row, (mean, sd) in zip(rows, accuracies, strict=True)
        if mean >= best - max(sd, noise)
    ]
    yield Verdict(
        "A small rank is as accurate as full fine-tuning.",
        "LoRA paper",
        f"at some rank of at most an eighth of {high} the mean test accuracy is within one "
        "standard deviation of that of full fine-tuning, or above",
        f"full {100 * best:.2f} ± {100 * noise:.2f} %; reached at the ranks "
        f"{', '.join(map(str, enough)) or 'none'}",
        bool(enough) and min(enough) <= high / 8,
    )


def _falls(values: Sequence[float]) -> bool:
    falling = all(a > b for a, b in itertools.pairwise(values))
    return falling and values[-1] < values[0] / 2


def _intrinsic_rank(results: Results) -> Iterator[Verdict]:
    spectra = results["spectra"]["spectra"]
    found = {
        path: (rank_of_energy(s["full"], 0.9), rank_of_energy(s["gaussian"], 0.9), s["min_dim"])
        for path, s in spectra.items()
    }
    yield Verdict(
        "The change of the weights has a low intrinsic rank: by its spectrum.",
        "LoRA paper, article",
        "in every layer a tenth of the singular values of full fine-tuning's dW, or fewer, hold "
        "90 % of its squares",
        "; ".join(
            f"{path}: {k} of {n} (random numbers: {random})"
            for path, (k, random, n) in found.items()
        ),
        all(k <= max(1, n // 10) for k, _, n in found.values()),
    )
    rows, base = results["spectra"]["truncated"], results["accuracy"]["rank"][0]["runs"][0]
    before, whole = base["accuracy"][0], rows[-1]["accuracy"]
    kept = {row["rank"]: (row["accuracy"] - before) / (whole - before) for row in rows[:-1]}
    enough = [rank for rank, share in kept.items() if share >= 0.9]
    yield Verdict(
        "The change of the weights has a low intrinsic rank: by what is lost without the rest.",
        "LoRA paper, article",
        "full fine-tuning's dW cut to rank 8 or less keeps 90 % of the gain in test accuracy",
        f"base {100 * before:.2f} %, full {100 * whole:.2f} %; kept at rank "
        + ", ".join(f"{rank}: {100 * share:.0f} %" for rank, share in kept.items()),
        bool(enough) and min(enough) <= 8,
    )


def _subspaces(results: Results) -> Iterator[Verdict]:
    overlaps = results["spectra"]["overlaps"]
    for number, what in ((0, "the factor A"), (1, "the update AB")):
        firsts = {}
        for path, pairs in overlaps["phi"].items():
            firsts[path] = list(pairs.values())[number][0][0]
        random = max(1 / n for n in overlaps["inputs"].values())
        yield Verdict(
            f"Small and large ranks learn the same leading direction: in {what}.",
            "LoRA paper, section 7.2",
            "in every layer the first input directions have an overlap of more than 0.5",
            f"rank {overlaps['few']} and {overlaps['many']}: "
            + "; ".join(f"{path} {value:.2f}" for path, value in firsts.items())
            + f" (random directions: at most {random:.3f})",
            min(firsts.values()) > 0.5,
        )


def _memory(results: Results) -> Iterator[Verdict]:
    for name in ("base", "wide"):
        cost = results["cost"][name]
        full, lora = cost["full"], cost["lora"]
        ratios = {"gradients": full["gradients"] / lora["gradients"]}
        optimizers = full["optimizer"]
        for optimizer in optimizers:
            ratios[f"state of {optimizer}"] = optimizers[optimizer] / lora["optimizer"][optimizer]
        if "files" in cost:
            ratios["file"] = cost["files"]["full"] / cost["files"]["lora"]
        what = f"{cost['name']}, rank {cost['rank']}"
        yield Verdict(
            f"Gradients, optimizer state and files shrink significantly ({what}).",
            "article",
            "each of them to half or less",
            ", ".join(f"{key} 1/{ratio:.1f}" for key, ratio in ratios.items()),
            min(ratios.values()) >= 2,
        )
        yield Verdict(
            f"So does the memory of a training step ({what}).",
            "article",
            "all that the compiled step with Adam holds at once, to half or less",
            f"{_mb(full['step']['Adam'])} to {_mb(lora['step']['Adam'])}, of which activations "
            f"and what else is between {_mb(full['working'])} and {_mb(lora['working'])}",
            full["step"]["Adam"] >= 2 * lora["step"]["Adam"],
        )


def _switching(results: Results) -> Iterator[Verdict]:
    switching = results["switching"]
    share = switching["bytes"]["adapter"] / switching["bytes"]["model"]
    yield Verdict(
        "Another task costs little memory.",
        "article",
        "an adapter is at most a tenth of its model",
        f"rank {results['config']['rank']}: {_mb(switching['bytes']['adapter'])} beside "
        f"{_mb(switching['bytes']['model'])}, {100 * share:.0f} %; on the wide network "
        f"{100 * results['cost']['wide']['trained'] / results['cost']['wide']['params']:.1f} %",
        share <= 0.1,
    )
    rows = [row for row in switching["drift"] if row["dtype"] == "float32"]
    one, last = rows[0], rows[-1]
    yield Verdict(
        "Subtracting BA recovers the original weights.",
        "article",
        "every bit of every weight, in float32",
        f"after one switch {100 * one['changed']:.0f} % of the weights differ, by up to "
        f"{one['largest']:.1e} of the largest; after {last['switches']} {last['largest']:.1e}",
        one["changed"] == 0,
    )
    before = results["base_accuracy"]
    yield Verdict(
        "Subtracting BA recovers the original model, as far as its accuracy goes.",
        "article",
        f"in float32 the test accuracy is the base's after {last['switches']} switches",
        f"{100 * before:.2f} % before, {100 * last['accuracy']:.2f} % after; in bfloat16 "
        f"{100 * switching['drift'][-1]['accuracy']:.2f} %",
        abs(last["accuracy"] - before) < 1e-9,
    )
    worse = []
    for task in switching["tasks"]:
        means = {name: mean_sd(row[task])[0] for name, row in switching["accuracy"].items()}
        if means[task] < max(means.values()):
            worse.append(task)
    gains = [
        mean_sd(switching["accuracy"][task][task])[0] - switching["accuracy"]["base"][task][0]
        for task in switching["tasks"]
    ]
    yield Verdict(
        "Each task's adapter is the best there is for it.",
        "implied",
        "on every task its own adapter beats the base and the adapters of the others",
        "gains over the base of "
        + ", ".join(f"{100 * gain:.1f}" for gain in gains)
        + " points"
        + (f"; beaten on: {', '.join(worse)}" if worse else ""),
        not worse and min(gains) > 0,
    )


def _mb(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
