"""Folders that are whole or absent."""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax_lora.errors import CheckpointError

#: What PEFT calls the two files of an adapter, and what it puts before the modules' names.
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when the body is done.

    Raises:
        CheckpointError: It is there and holds something, or cannot be written.
    """
    path = Path(folder).expanduser().absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(
            f"{folder}: expected a new or an empty folder, but it holds something; choose another"
        )
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        partial.mkdir(parents=True)
        yield partial
        if path.exists():
            path.rmdir()  # it is empty
        partial.rename(path)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """A file of JSON, as PEFT writes it."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
