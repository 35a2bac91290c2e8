"""The benchmark of loading: its folders are what PEFT's are, and what it prints and saves."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jax_lora as jl

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "peft_load.py"


@pytest.fixture(scope="module")
def program() -> SimpleNamespace:
    """What the program defines; benchmarks/ is no package."""
    return SimpleNamespace(**runpy.run_path(str(PROGRAM)))


def test_a_thousand_tensors(program: SimpleNamespace, tmp_path: Path) -> None:
    """All are loaded, each where it belongs, into either kind of parameters."""
    count = program.make_folder(tmp_path / "x", 72, 8, "patterns")
    assert count == 1008
    file = jl.peft.tensors.TensorFile.open(tmp_path / "x" / "adapter_model.safetensors")
    assert len(file.tensors) == 1008
    found = {}
    for how in (program.FLAT, program.STACKED):
        base, names = program.make_base(72, 8, how, "patterns")
        loaded = jl.peft.load(tmp_path / "x", base, names)
        assert len(loaded.names) == 504
        assert {float(entry.scale) for entry in loaded.adapter.values()} == {1.0}
        found[how] = loaded.adapter
    key = "model.layers.41.mlp.up_proj"
    b = file.read(f"base_model.model.{key}.lora_B.weight")
    np.testing.assert_array_equal(found[program.FLAT][f"{key}.weight"].b, b.T)
    np.testing.assert_array_equal(found[program.STACKED]["mlp.up_proj"].b[41], b.T)


def test_what_it_prints_and_saves(
    program: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--layers", "3", "--width", "16", "--repeats", "1"]
    results = program.main([*arguments, "--save", str(tmp_path / "x.json")])
    saved = json.loads((tmp_path / "x.json").read_text())
    assert saved["results"] == results
    assert [(x["case"], x["parameters"]) for x in results] == [
        (case, how) for case in program.CASES for how in (program.FLAT, program.STACKED)
    ]
    assert {x["tensors"] for x in results} == {42}
    assert saved["hardware"]["platform"] == jax.devices()[0].platform
    assert "expected less than 1.0 s to load" in capsys.readouterr().out
