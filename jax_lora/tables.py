"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def count(number: int) -> str:
    """A count with thousands separators."""
    return f"{number:,}"


def format_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()
) -> str:
    """Columns padded to their widest cell, two spaces apart; ``right`` names right-aligned ones.

    Example:
        >>> rows = [("l1", "393,344"), ("l2", "16,512")]
        >>> print(format_table(("layer", "params"), rows, right=[1]))
        layer   params
        l1     393,344
        l2      16,512
    """
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if k in right else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
