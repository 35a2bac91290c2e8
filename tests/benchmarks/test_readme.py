"""The pages have the tables that were measured."""

from __future__ import annotations

import pytest

pytest.importorskip("tyro")

from benchmarks.readme import PAGES, ROOT, filled, written

END = "<!-- end of table -->\n"
PAGE = f"a\n<!-- table: step -->\n{{}}{END}b\n<!-- table: engine details -->\n{{}}{END}"


def test_the_pages_have_what_the_results_say() -> None:
    """After new results, ``python -m benchmarks.readme`` writes them."""
    pages = written()
    assert set(pages) == set(PAGES)
    for name, page in pages.items():
        assert "<!-- table: " in page
        assert (ROOT / name).read_text(encoding="utf-8") == page, name


def test_each_table_goes_to_its_place() -> None:
    tables = {"step": "| x |\n", "engine details": "| y |\n"}
    expected = PAGE.format("\n| x |\n\n", "\n| y |\n\n")
    for stale in ("", "old\n", "\n| z |\n\n"):
        assert filled(PAGE.format(stale, stale), tables) == expected


def test_a_table_that_was_not_measured() -> None:
    command = "python -m benchmarks engine --out benchmarks/results"
    said = f"\nNot measured yet: `{command}`.\n\n"
    assert filled(PAGE.format("", "old\n"), {"step": "x\n"}) == PAGE.format("\nx\n\n", said)


def test_a_table_of_nothing() -> None:
    with pytest.raises(ValueError, match=r"got \['stepp details'\]"):
        filled(PAGE.replace("engine", "stepp"), {"step": ""})
