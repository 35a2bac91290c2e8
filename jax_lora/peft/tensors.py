"""The safetensors format: a header of JSON, and the numbers behind it; nothing is ever unpickled.

The whole format is eight bytes that give the header's length, the header, which says of every
tensor its dtype, shape and place, and the tensors' bytes. It is read here with numpy alone, whose
bfloat16 is that of ml_dtypes, which comes with jax. Everything that a header says is checked
against the size of the file before memory is taken.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_lora.errors import CheckpointError
from jax_lora.peft.files import listed, new_file

#: The dtypes of trained numbers.
FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
#: And what a file may hold besides.
DTYPES = FLOATS | {
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    **{f"I{8 * size}": np.dtype(f"int{8 * size}") for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": np.dtype(f"uint{8 * size}") for size in (1, 2, 4, 8)},
    "BOOL": np.dtype(bool),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: A hundred thousand tensors; what Python makes of JSON takes up to 25 times the text.
_MAX_HEADER = 16 * 2**20
_MAX_JSON = 4 * 2**20
_DAMAGED = "a damaged or an unfinished copy? Fetch the file again"


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor is in a file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """A safetensors file of which the header has been read and checked.

    Attributes:
        path: The file.
        tensors: What it holds, by name.
        metadata: The strings kept beside the tensors.
    """

    path: Path
    tensors: dict[str, Stored]
    metadata: dict[str, str]

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read and check the header.

        Raises:
            CheckpointError: The file is missing, or its header and its size do not agree.
        """
        try:
            if not path.is_file():
                raise CheckpointError(f"{path}: expected a safetensors file, found none")
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, _MAX_HEADER):
                    raise CheckpointError(
                        f"{path}: expected a safetensors file, whose first eight bytes say how "
                        f"long its header is; they say {length:,} bytes, and the file has "
                        f"{size:,}; {_DAMAGED}"
                    )
                text = file.read(length)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        header = parse_json(path, text)
        metadata = header.pop("__metadata__", {})
        strings = isinstance(metadata, dict) and all(isinstance(x, str) for x in metadata.values())
        problems = [] if strings else ["__metadata__: expected strings by name"]
        start = 8 + length
        tensors: dict[str, Stored] = {}
        for name, entry in header.items():
            stored = _stored(entry, start)
            if isinstance(stored, str):
                problems.append(f"{name}: {stored}")
            else:
                tensors[name] = stored
        if not problems:
            at = start
            for stored in sorted(tensors.values(), key=lambda x: (x.begin, x.end)):
                if stored.begin != at:
                    at = -1
                    break
                at = stored.end
            if at != size:
                problems.append(
                    f"expected the tensors to fill the file of {size:,} bytes without gaps or "
                    "overlaps, they do not"
                )
        if problems:
            raise CheckpointError(f"{path}: {_DAMAGED}:\n  {listed(problems)}")
        return cls(path, tensors, metadata)

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the dtype it was written in.

        Raises:
            CheckpointError: It cannot be read.
        """
        stored = self.tensors[name]
        try:
            with self.path.open("rb") as file:
                file.seek(stored.begin)
                data = file.read(stored.end - stored.begin)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error}") from error
        if len(data) != stored.end - stored.begin:
            raise CheckpointError(f"{self.path}: {name}: the file ends within it; {_DAMAGED}")
        return np.frombuffer(data, DTYPES[stored.dtype]).reshape(stored.shape)


class StoredArray:
    """A tensor of a file that is read when its values are asked for, and not kept.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
    """

    def __init__(self, file: TensorFile, name: str):
        self._file, self._name = file, name
        stored = file.tensors[name]
        self.shape, self.dtype = stored.shape, DTYPES[stored.dtype]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """For numpy: the values."""
        value = self._file.read(self._name)
        return value if dtype is None else value.astype(dtype)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file, marked as PyTorch's so that its readers take it.

    Raises:
        CheckpointError: A dtype that is not written here.
    """
    odd = [f"{name}: {x.dtype}" for name, x in tensors.items() if x.dtype not in _NAMES]
    if odd:
        raise CheckpointError(
            f"{path}: expected dtypes {', '.join(map(str, _NAMES))}, got {'; '.join(odd)}"
        )
    # Wide dtypes first, so that every tensor is aligned: what the format's own writer does.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        x = tensors[name]
        places = [at, at + x.nbytes]
        header[name] = {"dtype": _NAMES[x.dtype], "shape": list(x.shape), "data_offsets": places}
        at += x.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)


def read_json(path: Path) -> dict[str, Any]:
    """A file of one JSON object.

    Raises:
        CheckpointError: It is missing, too large, no JSON, or no object.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: expected a file of JSON, found none")
        size = path.stat().st_size
        if size > _MAX_JSON:
            raise CheckpointError(
                f"{path}: expected at most {_MAX_JSON:,} bytes of JSON, found {size:,}"
            )
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return parse_json(path, text)


def parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """One JSON object; what Python reads although JSON does not allow it is refused.

    Raises:
        CheckpointError: It is no JSON, or no object, or names something twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name occurs twice")
        return found

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        value = json.loads(text.decode(), object_pairs_hook=once, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); {_DAMAGED}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _stored(entry: Any, start: int) -> Stored | str:
    """A tensor's entry in the header, or what is wrong with it."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "expected dtype, shape and data_offsets"
    dtype, shape, places = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"expected a dtype among {', '.join(DTYPES)}, found {dtype!r:.60}"
    if not _sizes(shape) or not _sizes(places) or len(places) != 2:
        return "expected shape and data_offsets to be non-negative integers"
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if places[1] - places[0] != needed:
        return (
            f"a tensor of {dtype} and shape {shape} takes {needed:,} bytes, data_offsets leave it "
            f"{places[1] - places[0]:,}"
        )
    return Stored(dtype, tuple(shape), start + places[0], start + places[1])


def _sizes(values: Any) -> bool:
    # 2^63 is more than any file has; a header may write numbers of a million digits.
    whole = isinstance(values, list) and all(type(x) is int for x in values)
    return whole and len(values) <= 64 and all(0 <= x < 2**63 for x in values)
