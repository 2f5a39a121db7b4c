# SPDX-License-Identifier: BSD-3-Clause
"""CONTRIBUTING.md's house rules, as far as a machine can read them."""

from __future__ import annotations

import io
import re
import statistics
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("aspp_ext", "benchmarks", "csrc", "docs", "examples", "scripts", "tests")
PYTHON, CXX = {".py", ".pyi"}, {".cpp", ".h", ".cu", ".cuh"}
TEXTS = {".md", ".toml", ".txt", ".yaml", ".in", ".csv", ".json"}
MAX_LINES, MAX_MEDIAN, MAX_COLUMNS = 500, 150, 100


def files(suffixes: set[str]) -> list[Path]:
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    found = [p for p in found if p.suffix in suffixes and not p.name.startswith("_build_info")]
    inside = {p: p.relative_to(ROOT).parts for p in found}
    return sorted(p for p in found if not any(x.startswith((".", "__pyc")) for x in inside[p]))


SOURCES = files(PYTHON | CXX)


def comments(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, text without its marker) of every comment."""
    text = path.read_text()
    if path.suffix in PYTHON:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string[1:].strip()
    else:
        for number, line in enumerate(text.splitlines(), 1):
            if found := re.match(r'(?:[^"]|"[^"]*")*?//+(.*)', line):
                yield number, found[1].strip()


def looks_like_code(comment: str, path: Path) -> bool:
    if path.suffix in CXX:
        statement = r"[\w:>.\])]+(\(.*\)|\s*[-+*]?=\s.*|\s\w+);\s*$"
        return bool(re.match(statement, comment) or re.match(r"#\s*(include|define|if)", comment))
    return bool(re.match(r"(import \w+|from [\w.]+ import|def \w+\(|return \w+|print\()", comment))


def check(rule: Callable[[Path], object], paths: list[Path] = SOURCES) -> None:
    """``rule`` returns what is wrong with a file."""
    found = {str(path.relative_to(ROOT)): wrong for path in paths if (wrong := rule(path))}
    assert not found, "\n".join(f"{path}: {wrong}" for path, wrong in found.items())


def test_files_are_short():
    def rule(path: Path) -> str:
        count = len(path.read_text().splitlines())
        limit = 149 if path.name == "setup.py" else MAX_LINES
        return f"{count} lines, at most {limit}" if count > limit else ""

    check(rule)
    counts = [len(path.read_text().splitlines()) for path in SOURCES]
    assert statistics.median(counts) <= MAX_MEDIAN


def test_lines_are_short():
    def rule(path: Path) -> list[int]:
        lines = path.read_text().splitlines()
        return [number for number, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS]

    check(rule)


def test_licence_is_one_line():
    def rule(path: Path) -> str:
        first = path.read_text().partition("\n")[0]
        marker = "#" if path.suffix in PYTHON else "//"
        return "" if first == f"{marker} SPDX-License-Identifier: BSD-3-Clause" else first

    check(rule)


def test_no_commented_out_code():
    check(lambda path: [(n, text) for n, text in comments(path) if looks_like_code(text, path)])


def test_every_todo_has_an_anchor():
    """As in TODO(what it waits for)."""
    bare = r"\b(TODO|FIXME|XXX)\b(?!\()"
    check(lambda path: [number for number, text in comments(path) if re.search(bare, text)])


def test_no_torch_header_where_kernels_and_the_planner_live():
    folders = [ROOT / folder for folder in ("csrc/plan", "csrc/cuda/kernels", "csrc/cuda/ptx")]
    there = [path for path in SOURCES if any(f in path.parents for f in folders)]
    assert len(there) > 30
    check(lambda p: re.findall(r'#include [<"](?:torch|ATen|c10)/', p.read_text()), there)


def test_no_machine_path():
    """Only paths that any Linux has may be written down."""
    homes = r"(?<![\w.$}])/(root|home|work|tmp|mnt|data|Users)/\w"

    def rule(path: Path) -> list[str]:
        return [line for line in path.read_text().splitlines() if re.search(homes, line)]

    check(rule, files(PYTHON | CXX | TEXTS | {""}))


def test_a_rule_that_is_broken_names_the_file():
    with pytest.raises(AssertionError, match=r"^setup\.py: wrong here"):
        check(lambda path: "wrong here" if path.name == "setup.py" else "")


@pytest.mark.parametrize(
    ("comment", "suffix", "expected"),
    [
        ("x = 3;", ".cpp", True),
        ("foo(a, b);", ".cpp", True),
        ("#include <vector>", ".cpp", True),
        ("rows y, y + r share a sequence; see plan.h", ".cpp", False),
        ("[N, H, W, C]", ".cpp", False),
        ("return x", ".py", True),
        ("from the left edge on", ".py", False),
    ],
)
def test_commented_out_code_is_recognised(comment, suffix, expected):
    assert looks_like_code(comment, Path("file" + suffix)) is expected
