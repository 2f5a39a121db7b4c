# SPDX-License-Identifier: BSD-3-Clause
"""CONTRIBUTING.md's house rules, as far as a machine can read them."""

from __future__ import annotations

import io
import re
import statistics
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("aspp_ext", "benchmarks", "csrc", "examples", "scripts", "tests")
PYTHON, CXX = {".py", ".pyi"}, {".cpp", ".h", ".cu", ".cuh"}
TEXTS = {".md", ".toml", ".txt", ".yaml", ".in", ".csv", ".json"}
MAX_LINES, MAX_MEDIAN, MAX_COLUMNS = 500, 150, 100


def files(suffixes: set[str]) -> list[Path]:
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    found = [p for p in found if p.suffix in suffixes and not p.name.startswith("_build_info")]
    return sorted(p for p in found if not any(part.startswith((".", "__pyc")) for part in p.parts))


SOURCES = files(PYTHON | CXX)
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))


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


@each_source
def test_size(path):
    lines = path.read_text().splitlines()
    limit = 149 if path.name == "setup.py" else MAX_LINES
    assert len(lines) <= limit, f"{len(lines)} lines, at most {limit}"
    wide = [number for number, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS]
    assert not wide, f"lines above {MAX_COLUMNS} columns: {wide}"


def test_median_size():
    counts = [len(path.read_text().splitlines()) for path in SOURCES]
    assert statistics.median(counts) <= MAX_MEDIAN


@each_source
def test_licence_is_one_line(path):
    first = path.read_text().partition("\n")[0]
    marker = "#" if path.suffix in PYTHON else "//"
    assert first == f"{marker} SPDX-License-Identifier: BSD-3-Clause"


@each_source
def test_no_commented_out_code(path):
    found = [(n, text) for n, text in comments(path) if looks_like_code(text, path)]
    assert not found


@each_source
def test_every_todo_has_an_anchor(path):
    bare = [n for n, text in comments(path) if re.search(r"\b(TODO|FIXME|XXX)\b(?!\()", text)]
    assert not bare, f"write TODO(what it waits for): lines {bare}"


@pytest.mark.parametrize("folder", ["csrc/plan", "csrc/cuda/kernels", "csrc/cuda/ptx"])
def test_no_torch_header(folder):
    for path in (ROOT / folder).rglob("*"):
        if path.suffix in CXX:
            assert not re.search(r'#include [<"](torch|ATen|c10)/', path.read_text()), path


@pytest.mark.parametrize(
    "path", files(PYTHON | CXX | TEXTS | {""}), ids=lambda p: str(p.relative_to(ROOT))
)
def test_no_machine_path(path):
    """Only paths that any Linux has may be written down."""
    homes = r"(?<![\w.$}])/(root|home|work|tmp|mnt|data|Users)/\w"
    found = [line for line in path.read_text().splitlines() if re.search(homes, line)]
    assert not found


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
