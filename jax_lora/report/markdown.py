"""The report: what was run, what it gave, and what it cost, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_lora.report.curves import accuracy_section, last, loss_section
from jax_lora.report.files import write_text
from jax_lora.report.results import (
    CURVE_KEYS,
    LABELS,
    PHASES,
    as_float,
    check_keys,
    dataset_title,
    reference_name,
)
from jax_lora.report.text import (
    byte_count,
    code,
    flat,
    listing,
    number,
    percent,
    plain,
    short,
    table,
)

#: What the report cannot do without.
_REPORT_KEYS = (
    *CURVE_KEYS,
    *("dataset_source", "seed", "config", "base_unchanged", "base_bytes", "adapter_bytes"),
    *("base.params", "lora.trainable_params", "lora.total_params", "lora.rank", "lora.alpha"),
    *("tables.base", "tables.lora", "seconds", "versions", "hardware", "notes"),
)


def write_report(
    results: Mapping[str, Any], path: str | Path, reference: Mapping[str, Any] | None = None
) -> Path:
    """Write the run up in Markdown, as one would send it to a colleague.

    The pictures of `write_plots` are linked as files in the report's own folder.

    Args:
        results: The results of a run.
        path: The file to write; its folder is made if need be.
        reference: Values to compare with; None where there are none, which the report says.

    Returns:
        The path written.

    Raises:
        ValueError: If the results lack a key, or have another number of losses than of windows.
    """
    check_keys(results, _REPORT_KEYS)
    lora = results["lora"]
    blocks = [
        f"# LoRA on {dataset_title(results)}: rank {lora['rank']}, alpha {plain(lora['alpha'])}",
        _headline(results, reference),
        *_what_was_run(results),
        *accuracy_section(results, reference),
        *loss_section(results, reference),
        *_parameters(results, reference),
        *_memory(results),
        *_time(results),
        "## Versions and hardware",
        f"Versions: {listing(results['versions'])}.",
        f"Hardware: {listing(results['hardware'])}.",
    ]
    if results["notes"]:
        blocks += ["## Caveats", "\n".join(f"- {note}" for note in results["notes"])]
    blocks += [
        "## All options",
        table(["option", "value"], [[f"`{k}`", code(v)] for k, v in flat(results["config"])]),
    ]
    return write_text("\n\n".join(blocks) + "\n", path)


def _headline(results: Mapping[str, Any], reference: Mapping[str, Any] | None) -> str:
    lora = results["lora"]
    before = as_float(lora.get("accuracy_before", last(results["base"]["accuracy"])))
    after = as_float(last(lora["accuracy"]))
    share = lora["trainable_params"] / lora["total_params"]
    what = (
        f"training {lora['trainable_params']:,} of {lora['total_params']:,} parameters "
        f"({percent(share, spec='.1f')}, rank {lora['rank']})"
    )
    epochs = len(lora["accuracy"])
    if not math.isfinite(after - before):
        change = f"test accuracy {percent(after)} (before: {percent(before)})"
    elif after == before:
        change = f"test accuracy unchanged at {percent(after)}"
    else:
        verb = "up" if after > before else "down"
        points = f"{100 * (after - before):+.2f} points"
        change = f"test accuracy {verb} from {percent(before)} to {percent(after)} ({points})"
    text = f"**{epochs} epoch{'s' * (epochs != 1)} of LoRA, {what}: {change}"
    if reference:
        base_epochs, lora_epochs = (len(reference[phase]["accuracy"]) for phase in PHASES)
        text += (
            f"; the {reference_name(reference)} has "
            f"{short(last(reference['base']['accuracy']))} before and "
            f"{short(last(reference['lora']['accuracy']))} after, "
            f"with {base_epochs} + {lora_epochs} epochs"
        )
    return text + ".**"


def _what_was_run(results: Mapping[str, Any]) -> list[str]:
    base_epochs, lora_epochs = (len(results[phase]["accuracy"]) for phase in PHASES)
    blocks = [
        "## What was run",
        (
            f"A base model trained for {base_epochs} epoch{'s' * (base_epochs != 1)} of "
            f"{results['steps_per_epoch']:,} steps on {dataset_title(results)} "
            f"({results['dataset_source']}), then frozen and adapted with LoRA for {lora_epochs} "
            f"more; seed {results['seed']}."
        ),
    ]
    if "command" in results:
        blocks.append(f"```\n{results['command']}\n```")
    changes = results.get("config_changes")
    if changes:
        rows = [[f"`{key}`", code(preset), code(used)] for key, (preset, used) in changes.items()]
        blocks += [
            "Options that differ from the preset:",
            table(["option", "preset", "this run"], rows),
        ]
    elif changes is not None:
        blocks.append("Every option is the preset's.")
    return blocks


def _parameters(results: Mapping[str, Any], reference: Mapping[str, Any] | None) -> list[str]:
    base, lora = results["base"], results["lora"]
    share = lora["trainable_params"] / lora["total_params"]
    ratio = lora["trainable_params"] / base["params"]
    counts = [
        ("base model", ("base", "params")),
        ("trained by LoRA", ("lora", "trainable_params")),
        ("base and adapter", ("lora", "total_params")),
    ]
    head = ["parameters", "this run"]
    rows = [[label, f"{results[phase][key]:,}"] for label, (phase, key) in counts]
    if reference:
        head.append(reference_name(reference))
        for row, (_, (phase, key)) in zip(rows, counts, strict=True):
            row.append(number(reference[phase].get(key), ","))
    blocks = [
        "## Parameters",
        table(head, rows),
        (
            f"LoRA trains {percent(share, spec='.1f')} of all parameters, which is "
            f"{percent(ratio, spec='.1f')} of the base model's number."
        ),
    ]
    for phase, title in (("base", "Base model:"), ("lora", "With the adapter:")):
        blocks += [title, f"```\n{results['tables'][phase].strip(chr(10))}\n```"]
        summary = reference[phase].get("summary") if reference else None
        if summary:
            printed = ", ".join(f"{key} {value:.2f}" for key, value in summary.items())
            blocks.append(f"The {reference_name(reference)}'s table ends: {printed}.")
    return blocks


def _memory(results: Mapping[str, Any]) -> list[str]:
    base, adapter = results["base_bytes"], results["adapter_bytes"]
    gradients = results.get("gradient_bytes", {"base": base, "lora": adapter})
    rows = [
        _compare("arrays", base, adapter),
        _compare("on disk", results.get("base_disk_bytes"), results.get("adapter_disk_bytes")),
        _compare("gradients while training", gradients["base"], gradients["lora"]),
    ]
    state = results.get("optimizer_bytes")
    if state is not None:
        rows.append(_compare("optimizer state", state["base"], state["lora"]))
        total = [gradients[phase] + state[phase] for phase in PHASES]
        rows.append(_compare("gradients + optimizer state", *total))
    unchanged = (
        "The base weights are bitwise what they were before LoRA."
        if results["base_unchanged"]
        else "**The base weights changed during LoRA: the adapter alone does not hold the result.**"
    )
    return [
        "## Memory and storage",
        table(["bytes", "training the base", "training the adapter", "adapter / base"], rows),
        "Gradients are counted as one array like each trained one; a MB is 10^6 bytes.",
        unchanged,
    ]


def _time(results: Mapping[str, Any]) -> list[str]:
    seconds = results["seconds"]
    rows = [["data", "", number(seconds.get("data"), ".2f"), ""]]
    for phase in PHASES:
        spent, epochs = seconds.get(phase, {}), len(results[phase]["accuracy"])
        run = spent.get("run")
        each = run / epochs if run is not None and epochs else None
        row = [spent.get("compile"), run, each]
        rows.append([LABELS[phase], *(number(value, ".2f") for value in row)])
    rows.append(["total", "", number(seconds.get("total"), ".2f"), ""])
    return ["## Wall time", table(["seconds", "compile", "run", "run per epoch"], rows)]


def _compare(label: str, base: int | None, adapter: int | None) -> list[str]:
    share = adapter / base if base and adapter is not None else None
    return [label, byte_count(base), byte_count(adapter), percent(share, spec=".1f")]
