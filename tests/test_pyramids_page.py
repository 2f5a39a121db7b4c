# SPDX-License-Identifier: BSD-3-Clause
"""docs/pyramids.md: each case of the zoo is there once, with its result, and its snippets run."""

from __future__ import annotations

import re
import sys
import types
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_fuse_zoo as zoo
import torch
from torch import nn

import aspp_ext
from aspp_ext.fuse import adapters

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "pyramids.md").read_text()
RESULTS = ("by name", "by structure", "as siblings", "part: ", "left alone: ")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)

TABLES: dict[str, tuple[str, Collection[str]]] = {
    "Published implementations": ("test_pyramids", zoo.REBUILT),
    "What people write": ("test_pyramids", zoo.HAND_WRITTEN),
    "What only looks like one": ("test_look_alikes", zoo.LOOK_ALIKES),
    "Classes of packages": ("test_real_classes", zoo.REAL),
}


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def lines(title: str) -> Iterator[tuple[str, list[str]]]:
    """(result, keys) of each line of the section's table."""
    _, _, *rows = [line for line in section(title).splitlines() if line.startswith("|")]
    for row in rows:
        *_, result, keys, _ = (cell.strip() for cell in row.split("|"))
        yield result, re.findall("`([^`]+)`", keys)


def left_alone(title: str, name: str) -> bool:
    if title == "What only looks like one":
        return name not in zoo.FUSED
    if title == "Classes of packages":
        others = any(part in name for part in zoo.NOT_OF_MAPS)
        return others or name == zoo.NOT_ATROUS or not zoo.REAL[name].pyramid
    return name in zoo.LEFT or not (zoo.REBUILT | zoo.HAND_WRITTEN)[name].pyramid


@pytest.mark.parametrize("title", TABLES)
def test_each_case_is_named_once(title: str) -> None:
    test, table = TABLES[title]
    assert f"`{test}[...]`" in section(title)
    assert hasattr(zoo, test)
    named = Counter(name for _, names in lines(title) for name in names)
    assert set(named) == set(table)
    assert [name for name, count in named.items() if count > 1] == []


@pytest.mark.parametrize("title", TABLES)
def test_each_result_is_what_the_zoo_s_tests_ask_for(title: str) -> None:
    siblings = {*zoo.SIBLINGS, zoo.FIXED_SIZE}
    for result, names in lines(title):
        assert names
        assert result.startswith(RESULTS), result
        for name in names:
            assert result.startswith("left alone") is left_alone(title, name), name
            assert result.startswith("as siblings") is (name in siblings), name
            said = zoo.LEFT.get(name)
            if title != "Classes of packages" and said is not None:
                assert (said or "nothing is said") in result, name


def test_numbers_of_cases() -> None:
    rows = {case.row for case in zoo.REBUILT.values()}
    counts = f"{len(rows)} published implementations, classes of installed packages, "
    counts += f"{len(zoo.HAND_WRITTEN)} ways to write one, and {len(zoo.LOOK_ALIKES)} modules"
    assert counts in " ".join(PAGE.split())


@pytest.fixture
def registered(monkeypatch) -> None:
    """What a snippet registers is forgotten again."""
    monkeypatch.setattr(adapters, "ADAPTERS", dict(adapters.ADAPTERS))


def run_snippet(code: str, monkeypatch) -> dict[str, Any]:
    """As the file of a module of its own."""
    module = types.ModuleType("snippet_of_the_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, "docs/pyramids.md", "exec"), vars(module))
    return vars(module)


def agree(original: nn.Module, ours: nn.Module, inputs: Any) -> None:
    original.load_state_dict(ours.state_dict())
    for training in (True, False):
        with torch.no_grad():
            expected = original.train(training)(inputs)
            got = ours.train(training)(inputs)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_with_example_inputs_runs(registered, monkeypatch) -> None:
    names = run_snippet(SNIPPETS[0], monkeypatch)
    head = names["head"]
    (entry,) = aspp_ext.fuse_report(head)
    assert (entry.fused, entry.recognised, entry.reason) == (True, "structure", None)
    agree(names["Head"](), head, [torch.randn(2, 24, 16, 20), torch.randn(2, 32, 8, 10)])


def test_an_adapter_with_a_fused_class_runs(registered, monkeypatch) -> None:
    names = run_snippet(SNIPPETS[1], monkeypatch)
    pyramid = names["pyramid"]
    (entry,) = aspp_ext.fuse_report(pyramid)
    assert (entry.fused, entry.recognised, entry.reason) == (True, "name", None)
    agree(names["Pyramid"](), pyramid, torch.randn(2, 32, 9, 11))
    pyramid.branches[0][2] = nn.GELU()
    assert "branches.0.2 is a GELU" in aspp_ext.fuse_report(pyramid)[0].reason


def test_a_list_needs_its_adapter(registered, monkeypatch) -> None:
    names = run_snippet(SNIPPETS[0], monkeypatch)
    adapters.ADAPTERS.pop("snippet_of_the_page:Head")
    with pytest.warns(UserWarning, match="left these modules as they were"):
        aspp_ext.fuse(names["Head"]())


def test_a_window_gains_by_its_adapter(registered, monkeypatch) -> None:
    names = run_snippet(SNIPPETS[1], monkeypatch)
    adapters.ADAPTERS.pop("snippet_of_the_page:Pyramid")
    (entry,) = aspp_ext.fuse_report(names["Pyramid"]())
    assert entry.recognised == "siblings"


@pytest.mark.skipif(tomllib is None, reason="needs tomllib")
def test_the_entry_point_s_group_and_function(registered, monkeypatch) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    points = tomllib.loads(text)["project"]["entry-points"]
    assert list(points) == [adapters.GROUP]
    _, _, name = points[adapters.GROUP]["my_package"].partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_snippet(SNIPPETS[2], monkeypatch)[name]()
    assert adapters.ADAPTERS["my_package.heads:Pyramid"].fused == "my_package.fused:FusedPyramid"


def test_links_exist() -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", PAGE)
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
