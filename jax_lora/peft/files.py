"""Folders that are whole or absent."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from jax_lora.errors import CheckpointError

#: What PEFT calls the two files of an adapter, and what it puts before the modules' names.
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_MOST_LISTED = 1000


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when the body is done and all is on the disk.

    Whatever happens before, there is no folder of that name, or the empty one that was there.

    Raises:
        CheckpointError: It is there and holds something, or cannot be written.
    """
    try:
        path = Path(folder).expanduser().resolve()  # the place that a link is to
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise CheckpointError(
                f"{folder}: expected a new or an empty folder, but it holds something; choose "
                "another"
            )
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            partial.mkdir(parents=True)
            yield partial
            _sync(partial)
            partial.rename(path)  # in the place of an empty one, but of no other
            _sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, which is on the disk when the body is done."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """A file of JSON, as PEFT writes it."""
    with new_file(path) as file:
        file.write((json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def listed(problems: Sequence[str]) -> str:
    """All problems of an error, of which a hostile file can have a million."""
    more = len(problems) - _MOST_LISTED
    shown = [*problems[:_MOST_LISTED], f"and {more:,} more"] if more > 0 else problems
    return "\n  ".join(shown)


def _sync(folder: Path) -> None:
    """Have a folder's names on the disk, not its files alone."""
    if not hasattr(os, "O_DIRECTORY"):
        return  # a system that does not open folders
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
