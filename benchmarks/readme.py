"""Puts the measured tables into the pages: ``python -m benchmarks.readme``.

A page has a table between the comments ``<!-- table: NAME -->`` and ``<!-- end of table -->``. It
is made from the results in `benchmarks/results/`, with a line below it that says what was run and
on what. Nothing of it is typed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from benchmarks.cli import BENCHMARKS, RESULTS
from benchmarks.harness import Report

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "benchmarks/README.md", "docs/checkpoints.md")
_BLOCK = re.compile(r"(<!-- table: ([^>]+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def measured(results: Path = RESULTS) -> dict[str, str]:
    """All tables by name; those that are not of a CPU have its platform in their name."""
    found = {}
    for path in sorted(results.glob("*.json")):
        benchmark, _, platform = path.stem.rpartition("-")
        if benchmark not in BENCHMARKS:
            continue  # what scripts have found
        report = Report.load(path)
        for name, table in BENCHMARKS[benchmark].tables(report).items():
            name = name if platform == "cpu" else f"{name} {platform}"
            found[name] = f"{table}\n\n{report.about()}\n"
    return found


def written() -> dict[str, str]:
    """The pages by name, as they shall be."""
    tables = measured()
    return {name: filled((ROOT / name).read_text(encoding="utf-8"), tables) for name in PAGES}


def filled(page: str, tables: Mapping[str, str]) -> str:
    """A page with every table as it was measured, or what would measure it.

    Raises:
        ValueError: Names every table that no benchmark makes.
    """
    names = [name for _, name, _ in _BLOCK.findall(page)]
    if unknown := [n for n in names if n not in tables and n.split()[0] not in BENCHMARKS]:
        raise ValueError(f"expected tables of the benchmarks {list(BENCHMARKS)}, got {unknown}")

    def content(name: str) -> str:
        command = f"python -m benchmarks {name.split()[0]} --out benchmarks/results"
        return tables.get(name, f"Not measured yet: `{command}`.\n")

    return _BLOCK.sub(lambda block: f"{block[1]}\n{content(block[2])}\n{block[3]}", page)


def main() -> None:
    """Fills all pages."""
    for name, page in written().items():
        (ROOT / name).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
