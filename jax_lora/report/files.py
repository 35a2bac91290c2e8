"""Text files that are either complete or as they were before."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(text: str, path: str | Path) -> Path:
    """Write a file beside its final place and move it there; its folder is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
