"""The results as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_lora.report.files import write_text

# Keys of the results in the order a reader wants them; others follow, the long tables come last.
_FIRST = (
    *("dataset", "dataset_source", "seed", "command", "config", "config_changes"),
    *("base", "lora", "base_unchanged", "steps_per_epoch", "loss_window", "seconds"),
    *("base_bytes", "adapter_bytes", "base_disk_bytes", "adapter_disk_bytes", "optimizer_bytes"),
    *("versions", "hardware", "notes"),
)
_LAST = ("tables",)


def write_json(results: Mapping[str, Any], path: str | Path) -> Path:
    """Write results as JSON, so that the file is either complete or as it was before.

    Args:
        results: The results of a run; only what JSON can hold.
        path: The file to write; its folder is made if need be.

    Returns:
        The path written.

    Raises:
        TypeError: If a value is not JSON-able; the file is left alone.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_json({"seed": 0, "dataset": "digits"}, Path(folder) / "results.json")
        ...     print(path.read_text(), end="")
        {
          "dataset": "digits",
          "seed": 0
        }
    """
    rank = {key: index for index, key in enumerate(_FIRST)} | dict.fromkeys(_LAST, len(_FIRST) + 1)
    keys = sorted(results, key=lambda key: (rank.get(key, len(_FIRST)), key))
    ordered = {key: _finite(results[key]) for key in keys}
    return write_text(json.dumps(ordered, indent=2, ensure_ascii=False) + "\n", path)


def _finite(value: Any) -> Any:
    """Replace what JSON has no number for, NaN and the infinities, by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
