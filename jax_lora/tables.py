"""Plain-text tables."""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence


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


def spans(numbers: Iterable[int], dash: str = "-", comma: str = ", ") -> str:
    """Numbers with runs of three or more shortened.

    Example:
        >>> spans([0, 1, 2, 3, 7, 9, 10])
        '0-3, 7, 9, 10'
    """
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    short = ([f"{r[0]}{dash}{r[-1]}"] if len(r) > 2 else map(str, r) for r in runs)
    return comma.join(piece for run in short for piece in run)


def group_numbered(rows: Mapping[str, Hashable]) -> dict[str, list[str]]:
    """Group the names of equal rows that differ only in numbers.

    Returns:
        The names of each group, in the order of their first, under a name for all of them.

    Example:
        >>> group_numbered({"l0/w": "a", "l1/w": "a", "l2/w": "b", "l3/w": "a"})
        {'l{0,1,3}/w': ['l0/w', 'l1/w', 'l3/w'], 'l2/w': ['l2/w']}
    """
    # A name is split into text at even and numbers at odd places, and merged place by place.
    groups = [(re.split("(0|[1-9][0-9]*)", name), row, [name]) for name, row in rows.items()]
    for place in range(1, max((len(pieces) for pieces, _, _ in groups), default=0), 2):
        merged: dict[Hashable, list[tuple[list[str], Hashable, list[str]]]] = {}
        for pieces, row, names in groups:
            rest = (*pieces[:place], "", *pieces[place + 1 :]) if place < len(pieces) else pieces
            merged.setdefault((*rest, row), []).append((pieces, row, names))
        groups = []
        for same in merged.values():
            pieces, row, _ = same[0]
            if len(same) > 1:
                numbers = spans((int(other[place]) for other, _, _ in same), "..", ",")
                pieces = [*pieces[:place], f"{{{numbers}}}", *pieces[place + 1 :]]
            groups.append((pieces, row, [name for _, _, names in same for name in names]))
    return {"".join(pieces): names for pieces, _, names in groups}
