"""Programs in processes of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.workers import Crew, Local, Missing, Worker


def test_a_program_in_a_process_of_its_own(tmp_path: Path) -> None:
    """It is called by name, its errors come back with where they are from, and it ends."""
    worker = Worker("pathlib:PosixPath", str(tmp_path))
    assert worker.call("joinpath", "x") == tmp_path / "x"
    with pytest.raises(RuntimeError, match=r"a program failed in its process:(.|\n)*FileNotFound"):
        worker.call("rename", tmp_path / "missing" / "x")
    assert worker.call("exists") is True
    worker.close()
    with pytest.raises(OSError, match="closed"):
        worker.call("exists")


def test_what_is_not_installed_is_said_and_left_out() -> None:
    factories = {
        "here": ("pathlib:PurePosixPath", "a", "b"),
        "absent": ("benchmarks_absent_package.module:subject",),
    }
    with Crew(factories, local=True) as crew:
        assert {name: str(path) for name, path in crew.ask("with_suffix", ".c").items()} == {
            "here": "a/b.c"
        }
        turns = crew.turns("with_name", "d")
        assert {name: str(turn()) for name, turn in turns.items()} == {"here": "a/d"}
    assert crew.missing == {"absent": "needs benchmarks_absent_package: pip install -e '.[bench]'"}


def test_a_module_of_ours_that_is_missing_is_an_error() -> None:
    """Only a peer may be absent."""
    with pytest.raises(ModuleNotFoundError, match=r"benchmarks\.absent"):
        Local("benchmarks.absent:subject")


def test_a_missing_package_in_another_process() -> None:
    with pytest.raises(Missing, match="needs benchmarks_absent_package"):
        Worker("benchmarks_absent_package:subject", os.getpid())
