# SPDX-License-Identifier: BSD-3-Clause
"""docs/promises.md names tests that exist, and a promise has at least one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "promises.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and "kept by" not in line]


def named_in(row: str) -> list[tuple[str, str]]:
    """(file, name) of each; ``::name`` is in the file named before it."""
    file, found = "", []
    for given, name in re.findall(r"`([\w.]*)::(\w+)`", row):
        file = given or file
        found.append((file, name))
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:50])
def test_each_promise_is_kept_by_tests(row: str) -> None:
    named = named_in(row)
    assert named
    for file, name in named:
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert name in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, name


def test_there_are_promises() -> None:
    assert len(ROWS) > 10
