# SPDX-License-Identifier: BSD-3-Clause
"""README.md's example runs, and its links and commands exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from aspp_pairs import torchvision

import aspp_ext
from aspp_ext import compat

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.skipif(not importlib.util.find_spec("torchvision"), reason="needs torchvision")
def test_example_runs():
    compat.import_torchvision()
    example, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    torch.testing.assert_close(names["logits"], names["expected"], rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_ways_out_run():
    """Each by itself, of a model that is fused."""
    _, unfused, decomposed = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    model, x = aspp_ext.fuse(torchvision.ASPP(8, [2], 4)).eval(), torch.randn(1, 8, 9, 9)
    expected = model(x)
    names: dict = {"aspp_ext": aspp_ext, "torch": torch, "model": model, "x": x}
    exec(compile(decomposed, "README.md", "exec"), names)
    torch.testing.assert_close(names["program"].module()(x), expected)
    operators = {str(node.target) for node in names["program"].graph.nodes}
    assert not [name for name in operators if "aspp_ext" in name or "norm" in name]
    exec(compile(unfused, "README.md", "exec"), names)
    assert type(model) is torchvision.ASPP
    torch.testing.assert_close(model(x), expected)


def test_links_exist():
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"`make (\w+)", (ROOT / page).read_text()):
            assert f"\n{target}:" in makefile, f"{page} names make {target}"


def test_changelog_has_this_version():
    assert re.search(
        rf"^## {re.escape(aspp_ext.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
