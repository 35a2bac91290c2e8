"""The report: plots, tables and verdicts, all of them made from the numbers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_lora.experiments.explore.spectra import ENERGIES, rank_of_energy
from jax_lora.experiments.explore.verdicts import (
    Results,
    finals,
    mean_sd,
    of_rank,
    spread,
    verdicts,
)
from jax_lora.report.charts import CYCLE, Line, Matrix, Panel, draw_matrices, draw_panels
from jax_lora.report.files import write_text
from jax_lora.report.text import byte_count, listing, percent, table

REPORT = "README.md"
_METRICS = (
    ("accuracy", "test accuracy (%)", 100.0),
    ("loss", "training loss, last epoch", 1.0),
    ("test_loss", "test loss", 1.0),
)


def write_pages(results: Results, folder: Path) -> Path:
    """Write the report and its plots.

    Args:
        results: As `jax_lora.experiments.explore.run.run_explore` returns them.
        folder: Where; made if need be.

    Returns:
        The report.
    """
    _plots(results, folder)
    seeds = f"{results['config']['num_seeds']} seeds"
    blocks = [
        f"# The article's claims, measured on {results['dataset']}",
        (
            "Made by one run of `scripts/explore_cifar10.py`, its criteria, words and verdicts "
            "included; `results.json` holds the numbers."
        ),
        f"```\n{results['command']}\n```",
        _what_was_run(results),
        "## What held and what did not",
        _verdict_table(results),
        *_learning(results, seeds),
        *_spectra(results),
        *_cost(results),
        *_switching(results, seeds),
        "## How it was run",
        _how(results),
    ]
    return write_text("\n\n".join(blocks) + "\n", folder / REPORT)


def _what_was_run(results: Results) -> str:
    options = results["config"]
    return (
        f"A base with {results['cost']['base']['params']:,} parameters and "
        f"{percent(results['base_accuracy'])} test accuracy is fine-tuned on the images it was "
        f"trained on, for {options['epochs']} epochs of batches of {options['batch_size']}, by SGD "
        f"with a learning rate of {options['learning_rate']:g} and momentum "
        f"{options['momentum']:g}: the article's second half. Where nothing else is said, the rank "
        f"is {options['rank']} and alpha {options['alpha']:g}, start and scaling are the "
        f"article's, and ± is one standard deviation over {options['num_seeds']} seeds, which "
        "differ in start and shuffles."
    )


def _verdict_table(results: Results) -> str:
    rows = [
        ["yes" if v.held else "**no**", f"{v.claim} ({v.source})", v.criterion, v.found]
        for v in verdicts(results)
    ]
    lines = table(["held", "claim", "criterion", "found"], rows)
    return lines.replace("| :-- | --: | --: | --: |", "| :-- | :-- | :-- | :-- |")


def _learning(results: Results, seeds: str) -> list[str]:
    accuracy = results["accuracy"]
    head = ["method", "trained parameters", *(label for _, label, _ in _METRICS)]
    rows = [
        ["base, before", "0", percent(results["base_accuracy"]), "-", "-"],
        _row("head only", accuracy["head"]),
        *(_row(f"LoRA, rank {row['rank']}", row) for row in accuracy["rank"]),
        _row("full fine-tuning", accuracy["full"]),
    ]
    epochs = results["config"]["epochs"]
    dense = [
        [
            str(row["rank"]),
            f"{of_rank(results, row['rank'])['params']:,}",
            spread(finals(of_rank(results, row["rank"])["runs"], "accuracy"), 100),
            f"{row['params']:,} (width {row['width']})",
            spread([run["accuracy"][epochs] for run in row["runs"]], 100),
            spread(finals(row["runs"], "accuracy"), 100),
        ]
        for row in accuracy["dense"]
    ]
    dense_head = [
        *("rank", "LoRA's parameters", "LoRA (%)", "dense model's parameters"),
        *(f"after {epochs} epochs (%)", f"after {2 * epochs} epochs (%)"),
    ]
    alphas = [_row(f"{row['alpha']:g}", row)[:1] + _row("", row)[2:] for row in accuracy["alpha"]]
    return [
        "## Rank",
        "![Accuracy and loss by rank](rank.png)",
        table(head, rows),
        f"Means over {seeds}, all after the same number of steps.",
        "## Against dense models of as many parameters",
        "![Accuracy of LoRA and dense models](dense.png)",
        table(dense_head, dense),
        (
            "The dense models start from nothing: after as many steps as LoRA, and after as many "
            "as base and LoRA together."
        ),
        "## Alpha",
        "![Accuracy and loss by alpha](alpha.png)",
        table(["alpha", *(label for _, label, _ in _METRICS)], alphas),
    ]


def _row(name: str, method: Mapping[str, Any]) -> list[str]:
    cells = [
        spread(finals(method["runs"], key), scale, ".2f" if scale > 1 else ".4f")
        for key, _, scale in _METRICS
    ]
    return [name, f"{method['params']:,}", *cells]


def _spectra(results: Results) -> list[str]:
    spectra = results["spectra"]
    energies = [f"{100 * share:.0f} %" for share in ENERGIES]
    rows = []
    for path, found in spectra["spectra"].items():
        kinds = {"full fine-tuning": found["full"], "random numbers": found["gaussian"]}
        kinds |= {f"LoRA, rank {rank}": values for rank, values in found["lora"].items()}
        for kind, values in kinds.items():
            counts = [str(rank_of_energy(values, share)) for share in ENERGIES]
            rows.append([path, kind, *counts, str(found["min_dim"])])
    cut = [
        [str(row["rank"] or "all"), percent(row["accuracy"])]
        for row in ({"rank": 0, "accuracy": results["base_accuracy"]}, *spectra["truncated"])
    ]
    cut[0][0] = "0 (the base)"
    distances = [[str(r["rank"]), spread(r["distance"], 1, ".3f")] for r in spectra["distances"]]
    overlaps = spectra["overlaps"]
    phi_rows = []
    for path, pairs in overlaps["phi"].items():
        for name, phi in pairs.items():
            sides = [min(k, len(phi), len(phi[0])) for k in (1, 4, 8)]
            values = [f"{phi[k - 1][k - 1]:.3f}" for k in sides]
            random = f"{sides[-1] / overlaps['inputs'][path]:.3f}"
            phi_rows.append([path, name, *values, random])
    phi_head = ["parameter", "bases", "φ(1, 1)", "φ(4, 4)", "φ(8, 8)", "random, φ(8, 8)"]
    return [
        "## The rank of the change",
        "![Singular values of updates](spectra.png)",
        (
            "How many of the largest singular values hold a share of the sum of their squares, of "
            "full fine-tuning's dW, LoRA's AB, and random normal numbers:"
        ),
        table(["parameter", "update", *energies, "there are"], rows),
        "Full fine-tuning with every kernel's dW cut to a rank, without training again:",
        table(["rank", "test accuracy"], cut),
        "How far LoRA's update is from full fine-tuning's, |dW - dW_full| / |dW_full|:",
        table(["rank", "distance"], distances),
        "## The directions of the change",
        "![Overlaps of input directions](overlap.png)",
        (
            "φ(i, j) = |U_i^T V_j|² / min(i, j) of the LoRA paper's section 7.2: how far the first "
            "i input directions of one update lie within the first j of another. Two random sets "
            "of n directions among d have φ(n, n) = n / d on average. (Where a layer has fewer, "
            "the columns are for as many as there are.)"
        ),
        table(phi_head, phi_rows),
    ]


def _cost(results: Results) -> list[str]:
    blocks = [
        "## Memory and storage",
        "![Bytes of full fine-tuning and LoRA](bytes.png)",
    ]
    for name in ("base", "wide"):
        cost = results["cost"][name]
        rows = [
            [label, byte_count(full), byte_count(lora), f"{100 * lora / full:.1f} %"]
            for label, full, lora in cost_rows(cost)
        ]
        blocks += [
            f"{cost['name']}, LoRA of rank {cost['rank']}: {cost['trained']:,} trained parameters "
            f"of {cost['params']:,}:",
            table(["bytes", "full fine-tuning", "LoRA", "LoRA / full"], rows),
        ]
    blocks.append(
        "Gradients are the outputs of the compiled gradient. Working memory is what that needs "
        "beside its arguments and outputs, activations above all. A step holds parameters, "
        "optimizer state, working memory and the new state at once, as the compiler counts them "
        "with the old state given up. The wide network was compiled and not run."
    )
    return blocks


def cost_rows(cost: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """The bytes of full fine-tuning and of LoRA by what they are for."""
    full, lora = cost["full"], cost["lora"]
    rows = [("gradients", full["gradients"], lora["gradients"])]
    for name in full["optimizer"]:
        rows.append((f"state of {name}", full["optimizer"][name], lora["optimizer"][name]))
    rows.append(("working memory", full["working"], lora["working"]))
    for name in full["step"]:
        rows.append((f"a step with {name}", full["step"][name], lora["step"][name]))
    if "files" in cost:
        rows.append(("file", cost["files"]["full"], cost["files"]["lora"]))
    return rows


def _switching(results: Results, seeds: str) -> list[str]:
    switching = results["switching"]
    times = [[name, f"{value:.2f}"] for name, value in switching["milliseconds"].items()]
    drift = [
        [
            row["dtype"],
            f"{row['switches']:,}",
            f"{row['largest']:.1e}",
            f"{100 * row['changed']:.0f} %",
            percent(row["accuracy"]),
        ]
        for row in switching["drift"]
    ]
    matrix = [
        [name, *(spread(row[task], 100, ".1f") for task in switching["tasks"])]
        for name, row in switching["accuracy"].items()
    ]
    head = ["adapter", *(f"on: {task}" for task in switching["tasks"])]
    return [
        "## Switching between tasks",
        "![Accuracy of each adapter on each task](tasks.png)",
        f"Test accuracy (%) of every adapter on every task, means over {seeds}:",
        table(head, matrix),
        "Milliseconds, medians of runs in turns:",
        table(["what", "ms"], times),
        (
            "An adapter beside its base is switched by passing another one, which takes the time "
            "of no operation at all: the last two rows are the same program."
        ),
        (
            "The article's way is to subtract BA and add B'A'. The base that is left when the last "
            "adapter is taken out, against what it was:"
        ),
        table(
            ["weights in", "switches", "largest change / largest weight", "changed", "accuracy"],
            drift,
        ),
    ]


def _how(results: Results) -> str:
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in results["seconds"].items())
    return "\n".join(
        [
            f"- Data: {results['dataset_source']}.",
            f"- Time: {seconds}. Sweeps trained {results['trainings']} models in these.",
            f"- Versions: {listing(results['versions'])}.",
            f"- Hardware: {listing(results['hardware'])}.",
        ]
    )


def _plots(results: Results, folder: Path) -> None:
    accuracy, options = results["accuracy"], results["config"]
    head, full = (accuracy[name]["runs"] for name in ("head", "full"))
    note = f"mean and standard deviation of {options['num_seeds']} seeds"
    for name, log_values in (("rank", options["ranks"]), ("alpha", options["alphas"])):
        panels = [
            Panel(
                name,
                label,
                [_line(f"LoRA, by {name}", name, accuracy[name], key, scale)],
                levels={
                    "full fine-tuning": scale * mean_sd(finals(full, key))[0],
                    "head only": scale * mean_sd(finals(head, key))[0],
                },
                log_x=True,
                ticks={value: f"{value:g}" for value in log_values},
            )
            for key, label, scale in _METRICS
        ]
        draw_panels(folder / f"{name}.png", panels, f"LoRA by {name}", note)
    draw_panels(folder / "dense.png", [_dense_panel(results)], "At equal steps", note)
    draw_panels(
        folder / "spectra.png",
        [_spectrum(path, s) for path, s in results["spectra"]["spectra"].items()],
        "Singular values of updates, the largest of each as 1",
    )
    overlaps = results["spectra"]["overlaps"]
    path, pairs = next(iter(overlaps["phi"].items()))
    draw_matrices(
        folder / "overlap.png",
        [Matrix(phi, title=name, x_label="j", y_label="i") for name, phi in pairs.items()],
        f"Overlap φ(i, j) of input directions, {path}",
        span=(0.0, 1.0),
        bar_label="φ(i, j)",
    )
    costs = [results["cost"][name] for name in ("base", "wide")]
    draw_panels(folder / "bytes.png", [_bytes_panel(cost) for cost in costs], "Bytes in training")
    switching = results["switching"]
    names = list(switching["accuracy"])
    values = [
        [100 * mean_sd(switching["accuracy"][name][task])[0] for task in switching["tasks"]]
        for name in names
    ]
    draw_matrices(
        folder / "tasks.png",
        [
            Matrix(
                values,
                rows=names,
                columns=switching["tasks"],
                x_label="task",
                y_label="base, or the adapter of",
                cell="{:.1f}",
            )
        ],
        "Test accuracy of each adapter on each task",
        bar_label="test accuracy (%)",
    )


def _line(label: str, name: str, rows: Sequence[Mapping[str, Any]], key: str, scale: float) -> Line:
    points = [mean_sd(finals(row["runs"], key)) for row in rows]
    return Line(
        label,
        [row[name] for row in rows],
        [scale * mean for mean, _ in points],
        [scale * sd for _, sd in points],
    )


def _dense_panel(results: Results) -> Panel:
    epochs, rows = results["config"]["epochs"], results["accuracy"]["dense"]
    lora = results["accuracy"]["rank"]

    def line(label: str, rows: Any, epoch: int) -> Line:
        points = [mean_sd([100 * run["accuracy"][epoch] for run in row["runs"]]) for row in rows]
        params = [row["params"] for row in rows]
        return Line(label, params, [mean for mean, _ in points], [sd for _, sd in points])

    return Panel(
        "trained parameters",
        "test accuracy (%)",
        [
            line("LoRA on the base", lora, epochs),
            line(f"dense from scratch, {2 * epochs} epochs", rows, 2 * epochs),
            line(f"dense from scratch, {epochs} epochs", rows, epochs),
        ],
        levels={"base": 100 * results["base_accuracy"]},
        log_x=True,
        ticks={row["params"]: f"{row['params']:,}" for row in lora[::2]},
    )


def _spectrum(path: str, found: Mapping[str, Any]) -> Panel:
    kinds = {"full fine-tuning": found["full"], "random numbers": found["gaussian"]}
    kinds |= {f"LoRA, rank {rank}": found["lora"][rank] for rank in list(found["lora"])[1::2]}
    lines = [
        Line(
            name,
            range(1, len(values) + 1),
            [value / values[0] for value in values],
            colour=CYCLE[k],
            style="dashed" if name == "random numbers" else "line",
        )
        for k, (name, values) in enumerate(kinds.items())
    ]
    label = "singular value / largest"
    return Panel("number of the singular value", label, lines, path, log_x=True, log_y=True)


def _bytes_panel(cost: Mapping[str, Any]) -> Panel:
    rows = cost_rows(cost)
    places = range(len(rows))
    return Panel(
        "",
        "bytes",
        [
            Line("full fine-tuning", places, [full for _, full, _ in rows], style="points"),
            Line("LoRA", places, [lora for _, _, lora in rows], style="points"),
        ],
        title=f"{cost['name']}, rank {cost['rank']}",
        log_y=True,
        ticks={place: name.replace(" ", "\n", 2) for place, (name, _, _) in enumerate(rows)},
    )
