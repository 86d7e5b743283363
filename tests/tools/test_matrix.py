"""The table of versions that were tried: rows are kept in order, and one of the same versions is replaced."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = "before\n<!-- torch -->\n| Python | torch | whole | tried |\n|---|---|---|---|\n<!-- end of torch -->\nafter\n"


@pytest.fixture
def matrix():
    spec = importlib.util.spec_from_file_location("matrix", ROOT / ".ci/matrix.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_are_kept_in_the_order_of_versions(matrix, tmp_path):
    page = tmp_path / "versions.md"
    page.write_text(PAGE)
    for python, torch, said in (
        ("3.11.7", "2.10.0", "1 failed"),
        ("3.11.7", "2.9.1", "2 passed"),
        ("3.9.1", "2.10.0", "3 passed"),
        ("3.11.7", "2.10.0", "4 passed"),
    ):
        matrix.keep(page, "torch", [python, torch, said, "today"])
    head, table = page.read_text().split("|---|---|---|---|\n")
    assert head == PAGE.split("|---|---|---|---|\n")[0]
    assert table == (
        "| 3.9.1 | 2.10.0 | 3 passed | today |\n"
        "| 3.11.7 | 2.9.1 | 2 passed | today |\n"
        "| 3.11.7 | 2.10.0 | 4 passed | today |\n"
        "<!-- end of torch -->\nafter\n"
    )


def test_the_page_has_both_tables(matrix):
    page = matrix.PAGE.read_text()
    for table in ("torch", "trainers"):
        assert page.count(f"<!-- {table} -->") == page.count(f"<!-- end of {table} -->") == 1
