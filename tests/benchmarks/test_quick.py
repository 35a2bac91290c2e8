"""Every benchmark, tiny: its programs agree, it notices when they do not, and what it prints."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import engine
from benchmarks.harness import Report, Row
from benchmarks.models import MODELS, make_mlp
from benchmarks.peers import STEP_PROGRAMS, by_hand, plain
from benchmarks.transformer import Task

pytest.importorskip("tyro")

from benchmarks import cli

#: Of the programs that are compared, those that need a newer Flax than this library does.
FLAX = tuple(map(int, importlib.metadata.version("flax").split(".")[:2])) >= (0, 12)
NEWER_FLAX = () if FLAX else ("jax_lora on NNX", "nnx.LoRA")


@pytest.fixture(autouse=True)
def _promotion() -> Iterator[None]:
    # optax.adam itself mixes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        yield


def quick(name: str, *argv: str) -> Report:
    return cli.main([name, "--quick", *argv])[name]


def check_rows(report: Report, programs: set[str]) -> None:
    """All programs are there; what cannot run says what to install."""
    assert {row.program for row in report.rows} == programs
    for row in report.rows:
        assert not row.samples  # nothing was timed
        if row.skipped:
            assert row.skipped.endswith("pip install -e '.[bench]'")
            package = row.skipped.split()[1].rstrip(":")
            assert importlib.util.find_spec(package) is None


def test_step() -> None:
    programs = [name for name in STEP_PROGRAMS if "compile" not in name and name not in NEWER_FLAX]
    report = quick("step", "--step.programs", *programs)
    check_rows(report, set(programs))
    ran = [row.program for row in report.ran(report.cases()[0])]
    assert {"jax_lora", "by hand", "weight-space", "jax_lora on linen"} <= set(ran)
    for case in report.cases():
        for row in report.ran(case):
            assert row.difference is not None
            assert row.difference <= report.facts["tolerance"]


def test_engine() -> None:
    # The other two compile the same layers again.
    models = sorted(MODELS.keys() - {"transformer", "remat"})
    report = quick("engine", "--engine.models", *models)
    check_rows(report, {engine.PLAIN, engine.HAND, engine.OURS})
    assert len(report.cases()) == len(models) == 4


def test_checkpoints() -> None:
    report = quick("checkpoints")
    # Two weights, each a, b and scale, two moments of a and b, and Adam's count; three layers.
    assert report.cases() == [f"{2 * 7 + 1} arrays", f"{3 * 2 * 7 + 1} arrays"]


def test_peft_load() -> None:
    report = quick("peft_load")
    assert [row.counts["tensors"] for row in report.rows] == [3 * 7 * 2] * 4 + [2 * 7 * 3] * 2


def test_startup() -> None:
    report = quick("startup")
    assert {"jax", "jax_lora"} <= {row.program for row in report.rows if not row.skipped}


def test_adapters() -> None:
    pytest.importorskip("orbax.checkpoint")
    report = quick("adapters")
    (case,) = report.cases()
    assert {"jax_lora", "jax_lora, PEFT's files"} <= {row.program for row in report.ran(case)}


def test_article() -> None:
    pytest.importorskip("torch")
    report = quick("article")
    found = {row.program: row.difference for row in report.rows if row.difference is not None}
    assert set(found) == {"PyTorch, article", "PyTorch, in memory", "jax_lora, second run"}


def test_a_difference_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # The program by hand alone reads it.
    monkeypatch.setattr(engine, "SCALE", engine.SCALE)
    original = engine.make_adapter

    def weaker(model: Any) -> Any:
        adapter = original(model)
        halved = {n: dataclasses.replace(f, scale=f.scale * 0.99) for n, f in adapter.items()}
        return type(adapter)(halved)

    monkeypatch.setattr(engine, "make_adapter", weaker)
    with pytest.raises(SystemExit, match=r"jax_lora: gradient of layers/1/kernel b: "):
        quick("engine", "--engine.models", "mlp")


def test_building_counts_what_a_program_does() -> None:
    model = make_mlp(True)
    subject = engine.subject(engine.OURS, "mlp", quick=True)
    times = subject.build()
    assert times["build_s"] == pytest.approx(sum(times[f"{x}_s"] for x in STAGES))
    counts = subject.counts()
    # Each of three layers: x W, x a and h b; for the gradients of a, b and h one each, and for that
    # of x, but in the first layer, one through W and one through a.
    assert counts["dot_generals"] == 3 * (3 + 3) + 2 * 2
    arguments = (*jax.tree.leaves(engine.make_adapter(model)), *jax.tree.leaves(model.params))
    size = sum(x.nbytes for x in (*arguments, *model.batch))
    assert counts["argument_bytes"] == size


STAGES = ("trace", "lower", "compile")


def dot_flops(jaxpr: Any) -> int:
    """Two for each multiply-add of all products in a jaxpr."""
    total = 0
    for eqn in jaxpr.eqns:
        inner = [p for p in eqn.params.values() if hasattr(p, "jaxpr")]
        steps = eqn.params.get("length", 1)
        total += sum(steps * dot_flops(p.jaxpr) for p in inner)
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            inputs = math.prod(shape[axis] for axis in contracted)
            total += 2 * inputs * math.prod(eqn.outvars[0].aval.shape)
    return total


def test_the_flops_of_a_step_are_those_of_the_program_by_hand() -> None:
    """Counted in its trace; the head's product has a row for each token but the last."""
    task = Task(width=64, depth=3, tokens=12, batch=2, rank=4, vocabulary=32)
    subject = by_hand.subject(task)
    trace: Callable[..., Any] = jax.make_jaxpr(subject.step_function())
    counted = dot_flops(trace(*subject.arguments()).jaxpr)
    assert counted == task.flops
    assert functools.reduce(
        lambda n, x: n + x.size, jax.tree.leaves(plain.factors_of(task)), 0
    ) == (task.depth * task.rank * (4 * (64 + 64) + 2 * (64 + 256)))


def test_tables_of_what_was_not_measured_say_why() -> None:
    from benchmarks import step

    samples = {"step_s": [0.5, 0.25, 0.5], "trace_s": [1.0], "lower_s": [0.5], "compile_s": [1.5]}
    counts = {"tokens": 100.0, "model_flops": 1e9, "peak_bytes": 5e6, "peak_rss_bytes": 7e6}
    rows = [
        Row("small", "jax_lora", samples, counts),
        Row("small", "by hand", {"step_s": [0.5, 0.5, 0.5]}, counts),
        Row("small", "qwix on linen", skipped="needs qwix"),
    ]
    report = Report(rows, {"rates": {"flops_per_s": 4e9}})
    table = step.case_table(report, "small")
    assert [line.strip("| ").split(" | ")[:5] for line in table.splitlines()[2:4]] == [
        ["jax_lora", "500.0", "", "200", "50%"],
        ["by hand", "500.0", "1.00 (1.00-1.50)", "200", "50%"],
    ]
    assert "| qwix on linen | needs qwix |" in table
    summary = step.tables(report)["step"].splitlines()
    assert summary[2:] == [
        "| by hand | jax_lora | 1.00 (1.00-1.50) |",
        "| qwix on linen | jax_lora on linen | needs qwix |",
    ]


def test_arrays_of_layers_are_told_apart() -> None:
    """What the check compares is not the same for all layers, nor for a and b."""
    task = Task(width=64, depth=2, tokens=4, rank=4, scanned=False)
    arrays = plain.arrays_of(plain.factors_of(task))
    assert not np.array_equal(arrays["query a"][0], arrays["query a"][1])
    assert arrays["up b"].shape == (2, 4, 256)
