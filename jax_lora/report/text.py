"""Numbers, options and tables as Markdown text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

#: What stands where there is no number.
BLANK = "-"


def number(value: float | None, spec: str) -> str:
    """A number in the given format, or `BLANK`."""
    if value is None or not math.isfinite(value):
        return BLANK
    return format(value, spec)


def percent(value: float | None, spec: str = ".2f") -> str:
    """A share from 0 to 1 as a percentage."""
    text = number(None if value is None else 100 * value, spec)
    return text if text == BLANK else f"{text} %"


def short(value: float | None) -> str:
    """A percentage with no more digits than it has: 0.38 -> "38 %"."""
    return percent(value, spec=".4g")


def byte_count(count: int | None) -> str:
    """A number of bytes, also in MB of 10^6 bytes."""
    return BLANK if count is None else f"{count:,} ({count / 1e6:.2f} MB)"


def plain(value: Any) -> str:
    """A value without trailing zeros."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def code(value: Any) -> str:
    """A value set as code."""
    return f"`{plain(value)}`"


def flat(options: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """List nested options as ``("outer.inner", value)``."""
    pairs: list[tuple[str, Any]] = []
    for key, value in options.items():
        if isinstance(value, Mapping) and value:
            pairs += flat(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def listing(pairs: Mapping[str, Any]) -> str:
    """Nested options on one line."""
    return ", ".join(f"{key} {code(value)}" for key, value in flat(pairs))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with its first column to the left and all others to the right."""
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in r)} |" for r in lines)
