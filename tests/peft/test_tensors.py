"""Hostile and damaged files: each is read as what it says, or refused by one error of ours."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jax_lora as jl
from jax_lora.errors import CheckpointError, JaxLoraError
from jax_lora.peft.tensors import TensorFile, write_tensors
from tests.peft.small import P, World, write

TARGETS = {"target_modules": ["head", "fc"]}


def _raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(dtype: str = "F32", shape: Any = (2,), places: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": places}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "they say 0 bytes, and the file has 0"),
        (b"abc", "the file has 3"),
        (_raw({}, length=2**63), "they say 9,223,372,036,854,775,808 bytes"),
        (_raw({}, length=3), "they say 3 bytes, and the file has 10"),
        (_raw(b"\xff\xfe"), "cannot be read as JSON"),
        (_raw(b"[1]"), "expected a JSON object, found list"),
        (_raw(b'{"a":' * 50000), "cannot be read as JSON"),
        (_raw(b'{"a": 1, "a": 2}'), "a name occurs twice"),
        (_raw(b'{"a": ' + b"9" * 5000 + b"}"), "cannot be read as JSON"),
        (_raw({"__metadata__": {"x": 1}}), "__metadata__: expected strings"),
        (_raw({"x": 1}), "x: expected dtype, shape and data_offsets"),
        (_raw({"x": _entry() | {"y": 1}}, bytes(8)), "x: expected dtype, shape and data_offsets"),
        (_raw({"x": _entry("F33")}, bytes(8)), "x: expected a dtype among"),
        (_raw({"x": _entry(shape=[-2])}, bytes(8)), "to be non-negative integers"),
        (_raw({"x": _entry(shape=[True, 2])}, bytes(8)), "to be non-negative integers"),
        (_raw({"x": _entry(shape=[2.0])}, bytes(8)), "to be non-negative integers"),
        (_raw({"x": _entry(shape=[1] * 99)}, bytes(8)), "to be non-negative integers"),
        (_raw({"x": _entry(places=[0])}, bytes(8)), "to be non-negative integers"),
        (_raw({"x": _entry(places=[8, 0])}, bytes(8)), "data_offsets leave it -8"),
        (_raw({"x": _entry(shape=[3])}, bytes(8)), "takes 12 bytes, data_offsets leave it 8"),
        (_raw({"x": _entry(shape=[2**31, 2**29])}, bytes(8)), "data_offsets leave it 8"),
        # A terabyte that is not there: refused before memory is taken.
        (_raw({"x": _entry(shape=[2**38], places=[0, 2**40])}, bytes(8)), "to fill the file"),
        (_raw({"x": _entry()}, bytes(9)), "to fill the file"),
        (_raw({"x": _entry()}, bytes(7)), "to fill the file"),
        (_raw({"x": _entry(places=[1, 9])}, bytes(9)), "to fill the file"),
        (_raw({"x": _entry(), "y": _entry()}, bytes(8)), "to fill the file"),
        (_raw({"x": _entry(), "y": _entry(places=[4, 12])}, bytes(12)), "to fill the file"),
    ],
)
def test_a_header_that_lies(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        TensorFile.open(file)
    assert message in str(caught.value)


def test_a_right_header_is_read(tmp_path: Path) -> None:
    """The control of the test above."""
    file = tmp_path / "x.safetensors"
    data = np.array([1.5, -2], np.float32).tobytes()
    for shape in ([2], [2, 1], [1, 2]):
        file.write_bytes(_raw({"__metadata__": {"a": "b"}, "x": _entry(shape=shape)}, data))
        opened = TensorFile.open(file)
        assert opened.metadata == {"a": "b"}
        np.testing.assert_array_equal(opened.read("x"), np.array([1.5, -2]).reshape(shape))


def test_texts_are_small_before_they_are_read(tmp_path: Path) -> None:
    """Python takes up to 25 times as much memory as the text of JSON has."""
    file = tmp_path / "x.safetensors"
    length = 16 * 2**20 + 1
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", length))
        opened.truncate(length + 8)  # nothing is on the disk
    with pytest.raises(CheckpointError, match="they say 16,777,217 bytes"):
        TensorFile.open(file)
    with (tmp_path / "x.json").open("wb") as opened:
        opened.truncate(4 * 2**20 + 1)
    with pytest.raises(CheckpointError, match="expected at most 4,194,304 bytes of JSON"):
        jl.peft.tensors.read_json(tmp_path / "x.json")


def test_an_error_of_a_million_lines_is_short(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(_raw({f"{k}": 1 for k in range(20_000)}))
    with pytest.raises(CheckpointError) as caught:
        TensorFile.open(file)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1002
    assert lines[-1] == "  and 19,000 more"


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match="expected a safetensors file, found none"):
            TensorFile.open(path)
    with pytest.raises(CheckpointError, match="expected dtypes float64, float32"):
        write_tensors(tmp_path / "x", {"x": np.zeros(2, np.complex64)})


def test_integers_are_no_factors(
    world: World, tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    key = f"{P}head.lora_A.weight"
    tensors[key] = np.ones((2, 6), np.int32)
    with pytest.raises(CheckpointError, match="expected F64, F32, F16, BF16, found I32"):
        world.load(write(tmp_path, TARGETS, tensors))


def test_every_truncation_is_refused(
    world: World, tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    folder = write(tmp_path, TARGETS, tensors)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        whole = (folder / name).read_bytes()
        for length in range(0, len(whole), 1 + len(whole) // 150):
            (folder / name).write_bytes(whole[:length])
            with pytest.raises(JaxLoraError):
                world.load(folder)
        (folder / name).write_bytes(whole)
    assert world.load(folder)
