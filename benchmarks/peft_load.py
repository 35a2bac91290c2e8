"""How long an adapter of PEFT with a thousand tensors takes to load and to be written.

Seven modules in each of 72 layers (48 for DoRA) have 1,008 tensors, as PEFT writes them; into
parameters that have torch's names, and into stacked ones, as a scan has them. The base is shapes
alone but for DoRA, whose norms it needs. Beside it stands what reading the file with numpy takes,
which is the least. The first call of a process, with what it compiles, is shown apart.

Usage:
    python benchmarks/peft_load.py --save benchmarks/results/peft-load-cpu.json
    python benchmarks/peft_load.py --layers 2 --width 32 --repeats 1

Expected: less than a second to load, also for the first call.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_lora as jl
from jax_lora.experiments.environment import hardware, versions
from jax_lora.peft.tensors import TensorFile, write_tensors

TARGET_S = 1.0
RANK = 16
MODULES = (
    *(f"self_attn.{x}_proj" for x in ("q", "k", "v", "o")),
    *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
)
FLAT, STACKED = "one parameter each", "stacked layers"
CASES = ("lora", "patterns", "dora")


def make_folder(folder: Path, layers: int, width: int, case: str) -> int:
    """Write such an adapter; returns the number of its tensors.

    Args:
        folder: Where.
        layers: The number of layers.
        width: The inputs and the outputs of every module.
        case: ``lora``; ``patterns``, a rank and an alpha by the name of each module; ``dora``.
    """
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    names = [f"model.layers.{k}.{module}" for k in range(layers) for module in MODULES]
    for name in names:
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = rng.standard_normal((RANK, width), np.float32)
        tensors[f"{key}.lora_B.weight"] = rng.standard_normal((width, RANK), np.float32)
        if case == "dora":
            tensors[f"{key}.lora_magnitude_vector"] = np.ones(width, np.float32)
    patterns = dict.fromkeys(names, RANK) if case == "patterns" else {}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": 2 * RANK if patterns else RANK,
        "lora_alpha": RANK,
        "target_modules": names,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "use_dora": case == "dora",
    }
    folder.mkdir(parents=True)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return len(tensors)


def make_base(layers: int, width: int, how: str, case: str) -> tuple[Any, list[jl.peft.Name]]:
    """The parameters, or their shapes, and what torch calls them."""
    make = jnp.ones if case == "dora" else jax.ShapeDtypeStruct
    if how == STACKED:
        shape = (layers, width, width)
        base = {module: make(shape, jnp.float32) for module in MODULES}
        name, axes = "model.layers.{k}.{module}.weight", "io"
        return base, [jl.peft.Name("{module}", name, "linear", axes)]
    names = [f"model.layers.{k}.{module}.weight" for k in range(layers) for module in MODULES]
    base = {name: make((width, width), jnp.float32) for name in names}
    return base, [jl.peft.Name("{name}", "{name}", "linear", "oi")]


def seconds(fun: Callable[[], Any]) -> float:
    """The wall time of a call, until its arrays are there."""
    start = time.perf_counter()
    jax.block_until_ready(fun())
    return time.perf_counter() - start


def read_all(folder: Path) -> list[np.ndarray]:
    """Every tensor, and nothing done with it."""
    file = TensorFile.open(folder / "adapter_model.safetensors")
    return [file.read(name) for name in file.tensors]


def measure(layers: int, width: int, repeats: int) -> list[dict[str, Any]]:
    """The times of every case and kind of parameters, in seconds."""
    results = []
    with tempfile.TemporaryDirectory() as where:
        for case in CASES:
            folder = Path(where) / case
            depth = 2 * layers // 3 if case == "dora" else layers  # of three tensors each
            count = make_folder(folder, depth, width, case)
            for how in (FLAT, STACKED):
                base, names = make_base(depth, width, how, case)
                found = {"case": case, "parameters": how, "tensors": count}
                results.append(found | measure_one(folder, base, names, repeats))
    return results


def measure_one(folder: Path, base: Any, names: list[jl.peft.Name], repeats: int) -> dict[str, Any]:
    """The times of one folder for one base."""

    def load() -> jl.Adapter:
        return jl.peft.load(folder, base, names).adapter

    def save() -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent) as out:
            jl.peft.save(Path(out) / "adapter", adapter, base, names)

    first = seconds(load)
    adapter = load()
    loads, reads, saves = [], [], []
    for _ in range(repeats):
        loads.append(seconds(load))
        reads.append(seconds(lambda: read_all(folder)))
        saves.append(seconds(save))
    medians = zip(("load_s", "read_s", "save_s"), (loads, reads, saves), strict=True)
    found: dict[str, Any] = {name: statistics.median(times) for name, times in medians}
    return found | {"first_load_s": first, "loads_s": loads}


def table(results: Sequence[dict[str, Any]]) -> str:
    """The times as a table of Markdown."""
    lines = [
        "| adapter | parameters | tensors | first load | load | reading alone | save |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for x in results:
        times = (f"{x[name]:.2f} s" for name in ("first_load_s", "load_s", "read_s", "save_s"))
        cells = [x["case"], x["parameters"], f"{x['tensors']:,}", *times]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measures, prints, saves if asked, and returns what was measured."""
    parser = argparse.ArgumentParser(description="Loading an adapter of PEFT.")
    parser.add_argument("--layers", type=int, default=72)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--save", type=Path, help="JSON file for all times")
    args = parser.parse_args(argv)
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    machine, found = hardware() | {"load_average_before": load}, versions()
    print(", ".join(f"{key} {value}" for key, value in (machine | found).items()), flush=True)
    results = measure(args.layers, args.width, args.repeats)
    print(table(results))
    worst = max(max(x["first_load_s"], x["load_s"]) for x in results)
    verdict = "reached" if worst < TARGET_S else "missed"
    print(f"expected less than {TARGET_S} s to load, got at most {worst:.2f}: {verdict}")
    if args.save is not None:
        saved = {
            "hardware": machine,
            "versions": found,
            "settings": {"layers": args.layers, "width": args.width, "repeats": args.repeats},
            "expected": {"load_s": TARGET_S},
            "results": results,
        }
        args.save.write_text(json.dumps(saved, indent=2) + "\n")
        print(f"saved to {args.save}")
    return results


if __name__ == "__main__":
    main()
