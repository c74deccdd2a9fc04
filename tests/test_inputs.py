"""docs/inputs.md says what is taken and what is refused: each of its rows names a test that there is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROW = re.compile(r"^\| (?P<input>.+?) \| (?P<result>.+?) \| `(?P<file>[\w/]+\.py)::(?P<test>\w+)` \|$")


HEADS = re.compile(r"^\| (input \| result|property \| what it means|`model_type`) \||^\|---")
FAMILIES = re.compile(r"^\| `\w+` \|( ✓[\w ]*\|)+$")  # tests/test_every_family.py


def rows() -> list[str]:
    """The rows of its tables, without their heads, and without the table of families."""
    lines = (TESTS.parent / "docs" / "inputs.md").read_text("utf-8").splitlines()
    return [
        line for line in lines if line.startswith("|") and not (HEADS.match(line) or FAMILIES.match(line))
    ]


@pytest.mark.parametrize("row", rows())
def test_a_row_names_a_test_that_there_is(row: str) -> None:
    found = ROW.match(row)
    assert found, f"not of the form | input | result | `file.py::test` |: {row}"
    tree = ast.parse((TESTS / found["file"]).read_text("utf-8"))
    assert found["test"] in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
