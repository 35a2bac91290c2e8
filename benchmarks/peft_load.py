"""How long an adapter of PEFT with a thousand tensors takes to load and to be written.

Seven modules in each of 72 layers (48 for DoRA) have 1,008 tensors, as PEFT writes them; into
parameters that have torch's names, and into stacked ones, as a scan has them. The base is shapes
alone but for DoRA, whose norms it needs. Beside it stands what reading the file with numpy takes,
which is the least. The first call of a process, with what it compiles, is shown apart.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_lora as jl
from benchmarks.harness import (
    Disagreement,
    Options,
    Report,
    Row,
    Sample,
    Samples,
    table,
    take_turns,
)
from benchmarks.machine import seconds
from jax_lora.peft.tensors import TensorFile, write_tensors

#: What loading shall stay below, also for the first time.
TARGET_S = 1.0
RANK = 16
MODULES = (
    *(f"self_attn.{x}_proj" for x in ("q", "k", "v", "o")),
    *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
)
FLAT, STACKED = "one parameter each", "stacked layers"
CASES = ("lora", "patterns", "dora")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftLoadOptions(Options):
    """Loading an adapter of PEFT with a thousand tensors.

    Attributes:
        layers: Layers, of seven modules each.
        width: Inputs and outputs of each module.
    """

    layers: int = 72
    width: int = 512


DEFAULTS = PeftLoadOptions()


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


class Folder:
    """One adapter, to be loaded into one kind of parameters and written again."""

    def __init__(self, folder: Path, base: Any, names: list[jl.peft.Name]):
        self._folder, self._base, self._names = folder, base, names
        self.first_load_s = seconds(self.load)
        self._adapter = self.load()

    def load(self) -> jl.Adapter:
        """The adapter."""
        return jax.block_until_ready(jl.peft.load(self._folder, self._base, self._names).adapter)

    def read(self) -> dict[str, np.ndarray]:
        """Every tensor, and nothing done with it."""
        return tensors_of(self._folder)

    def save(self, out: Path) -> None:
        """Write it."""
        jl.peft.save(out, self._adapter, self._base, self._names)

    def check(self) -> None:
        """Write it and read that.

        Raises:
            Disagreement: The tensors are not those that were loaded.
        """
        with tempfile.TemporaryDirectory(dir=self._folder.parent) as out:
            self.save(Path(out) / "adapter")
            written = tensors_of(Path(out) / "adapter")
        bits = [{n: x.tobytes() for n, x in found.items()} for found in (self.read(), written)]
        if bits[0] != bits[1]:
            raise Disagreement(f"{self._folder}: expected the tensors that were read, got others")

    def __call__(self) -> Sample:
        """Everything once; returns the seconds of each."""
        with tempfile.TemporaryDirectory(dir=self._folder.parent) as out:
            return {
                "load_s": seconds(self.load),
                "read_s": seconds(self.read),
                "save_s": seconds(lambda: self.save(Path(out) / "adapter")),
            }


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder by name."""
    file = TensorFile.open(folder / "adapter_model.safetensors")
    return {name: file.read(name) for name in file.tensors}


def run(options: PeftLoadOptions, quick: bool) -> Report:
    """Checks and measures every case and kind of parameters."""
    layers, width = (3, 16) if quick else (options.layers, options.width)
    rows = []
    with tempfile.TemporaryDirectory() as where:
        for case in CASES:
            depth = 2 * layers // 3 if case == "dora" else layers  # of three tensors each
            count = make_folder(Path(where) / case, depth, width, case)
            for how in (FLAT, STACKED):
                folder = Folder(Path(where) / case, *make_base(depth, width, how, case))
                folder.check()
                samples: Samples = {}
                if not quick:
                    samples = take_turns({case: folder}, options.repeats)[case]
                counts = {"tensors": float(count), "first_load_s": folder.first_load_s}
                rows.append(Row(f"{case}, {how}", "jax_lora", samples, counts, 0.0))
    return Report(rows, {"target_load_s": TARGET_S})


def tables(report: Report) -> dict[str, str]:
    """The times."""
    heads = ["adapter", "tensors", "first load", "load", "reading alone", "save"]
    lines = []
    for row in report.rows:
        times = [row.counts["first_load_s"], *map(row.median, ("load_s", "read_s", "save_s"))]
        cells = (f"{time:.2f} s" for time in times)
        lines.append([row.case, f"{row.counts['tensors']:,.0f}", *cells])
    return {"peft_load": table(heads, lines)}
