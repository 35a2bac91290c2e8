"""Names, and what "auto" does."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_lora.data import NAMES, DatasetError, Split, load

_HEAVY = ("tensorflow_datasets", "array_record", "sklearn", "PIL", "requests", "tqdm")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cifar-10", "'cifar10'"),
        ("CIFAR10", "'cifar10'"),
        ("cifar100", "'cifar10'"),
        ("digit", "'digits'"),
    ],
)
def test_an_unknown_name_gets_the_choices_and_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(DatasetError, match=f"auto, cifar10, digits.*did you mean {hint}"):
        load(name)


def test_a_name_like_no_other_gets_the_choices_only() -> None:
    with pytest.raises(DatasetError) as caught:
        load("xyz")
    assert "did you mean" not in str(caught.value)
    assert all(name in str(caught.value) for name in NAMES)


def test_auto_is_cifar10_where_it_can_be(
    miniature: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = load(
        "auto",
        data_dir=tmp_path / "data",
        archive=miniature.path,
        cache_dir=tmp_path / "cache",
        progress=False,
    )
    assert data.name == "cifar10"
    assert "NOTE" not in capsys.readouterr().err


def test_auto_falls_back_to_digits_and_says_so(
    miniature: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    assert load("auto").name == "digits"
    out, err = capsys.readouterr()
    assert out == ""
    words = " ".join(err.split())
    for part in (
        "CIFAR-10 is not available",
        "DIGITS are used instead",
        "comparison with the article",
        "no network in this test",
    ):
        assert part in words
    assert err.count("\n") > 5


def test_auto_falls_back_without_the_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    original = importlib.import_module

    def missing(name: str, package: str | None = None) -> Any:
        if name == "tensorflow_datasets":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, package)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert load("auto").name == "digits"
    assert "pip install 'jax_lora[cifar10]'" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(DatasetError, match=r"pip install 'jax_lora\[cifar10\]'"):
        load("cifar10")


def test_a_missing_reader_is_not_taken_for_damage(
    miniature: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"data_dir": tmp_path / "data", "cache_dir": tmp_path / "cache"}
    load("cifar10", archive=miniature.path, progress=False, **folders)
    monkeypatch.setitem(sys.modules, "array_record.python.array_record_module", None)
    with pytest.raises(DatasetError, match=r"'array_record.*pip install 'jax_lora\[cifar10\]'"):
        load("cifar10", progress=False, data_dir=tmp_path / "data", cache_dir=tmp_path / "new")


def test_importing_the_package_is_light() -> None:
    program = f"import sys, jax_lora.data; print([m for m in {_HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (np.zeros((2, 4, 4, 3)), np.zeros(2, np.int32)),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.int32)),
        (np.zeros((2, 4, 4, 3), np.uint8).transpose(0, 2, 1, 3), np.zeros(2, np.int32)),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, np.int64)),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, np.int32)),
    ],
)
def test_a_split_of_other_types_is_refused(images: np.ndarray, labels: np.ndarray) -> None:
    with pytest.raises(DatasetError, match="expected"):
        Split(images, labels)
