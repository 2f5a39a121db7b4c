# SPDX-License-Identifier: BSD-3-Clause
"""``python -m aspp_ext fuse``, and the table that it and ``fuse(verbose=True)`` print."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence

import pytest
import torch
from aspp_pairs import torchvision_aspp
from torch import Tensor, nn

from aspp_ext.__main__ import main
from aspp_ext.fuse import fuse, fuse_report

HERE = __name__


class OfTwo(nn.Module):
    """A pyramid of the second of two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=r, dilation=r) for r in (1, 2, 3))
        self.project = nn.Conv2d(12, 4, 1)

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return low, self.project(torch.cat([b(high) for b in self.branches], 1))


def without_pyramid() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())


def refused() -> nn.Module:
    module = torchvision_aspp()
    module.convs[1][0].stride = (2, 2)
    return module


def takes(word: str, number: int) -> nn.Module:
    assert (word, number) == ("some words", 3)
    return torchvision_aspp()


def broken() -> nn.Module:
    raise RuntimeError("it has no weights")


def no_module() -> int:
    return 3


class Group:
    """A factory may be an attribute of something."""

    make = staticmethod(torchvision_aspp)


def words(capsys) -> str:
    return " ".join(re.sub(r"[\u2500-\u257f]", " ", capsys.readouterr().out).split())


@pytest.mark.skipif(not importlib.util.find_spec("torchvision"), reason="needs torchvision")
def test_a_model_of_torchvision(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    name = "torchvision.models.segmentation:deeplabv3_mobilenet_v3_large"
    assert main(["fuse", name, "weights=None", "weights_backbone=None"]) == 0
    said = words(capsys)
    assert "skipped module state together left as it is gain" in said
    assert "classifier.0 fused 4 branches (rates 12, 24, 36)" in said
    assert re.search(r"\d+% / \d+%", said)


@pytest.mark.parametrize(
    ("factory", "status"),
    [
        ("torchvision_aspp", 0),
        ("Group.make", 0),
        ("without_pyramid", 1),
        ("refused", 1),
        ("OfTwo", 1),
    ],
)
def test_exit_status(factory: str, status: int, capsys) -> None:
    assert main(["fuse", f"{HERE}:{factory}"]) == status
    said = words(capsys)
    if factory == "without_pyramid":
        assert "No pyramid was found" in said
    elif factory == "OfTwo":
        assert "example_inputs may help" in said
    elif status:
        assert "stride" in said


def test_input() -> None:
    arguments = ["fuse", f"{HERE}:OfTwo", "--input", "2x3x16x24", "--input", "2x8x8x12"]
    assert main(arguments) == 0


def test_arguments_are_python_s_values_or_words() -> None:
    assert main(["fuse", f"{HERE}:takes", "word=some words", "number=3"]) == 0


BAD = {
    "package.module": "fuse: a factory must be package.module:name, got 'package.module'",
    ":name": "fuse: a factory must be package.module:name, got ':name'",
    "no_such_package.at_all:make": (
        "fuse: no_such_package.at_all:make makes no model: ModuleNotFoundError: "
        "No module named 'no_such_package'"
    ),
    f"{HERE}:nothing": f"fuse: {HERE}:nothing makes no model: AttributeError: ",
    f"{HERE}:broken": f"fuse: {HERE}:broken makes no model: RuntimeError: it has no weights",
    f"{HERE}:no_module": f"fuse: {HERE}:no_module must make a module, it made a int",
    f"{HERE}:takes": f"fuse: {HERE}:takes makes no model: TypeError: ",
    f"{HERE}:takes number": "fuse: an argument must be name=value, got 'number'",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_factories(line: str) -> None:
    with pytest.raises(SystemExit) as error:
        main(["fuse", *line.split()])
    said = str(error.value.code)
    assert said.startswith(BAD[line])
    assert "\n" not in said


@pytest.mark.parametrize("given", [["--input", "2x"], ["--input", "map"], []])
def test_bad_options(given: Sequence[str], capsys) -> None:
    arguments = ["fuse", f"{HERE}:OfTwo", *given] if given else ["fuse"]
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert "must be sizes like 1x3x65x65" in said if given else "PACKAGE.MODULE:FACTORY" in said


def test_input_that_the_model_does_not_take() -> None:
    with pytest.raises(SystemExit, match="fuse: the model does not run on example_inputs"):
        main(["fuse", f"{HERE}:OfTwo", "--input", "2x3x16x24"])


def test_verbose(capsys) -> None:
    model = nn.ModuleList([torchvision_aspp(), refused()])
    with pytest.warns(UserWarning, match="1: "):
        fuse(model, verbose=True)
    said = words(capsys)
    assert "0 fused 4 branches" in said
    assert "1 left alone convs.1.0 has stride" in said
    assert fuse(model[0]) is model[0]
    assert capsys.readouterr().out == ""


def test_a_report_is_a_list_and_a_table() -> None:
    report = fuse_report(torchvision_aspp())
    assert [(e.name, e.fused, e.reason) for e in report] == [("", False, None)]
    assert "(the model)" in str(report)
    assert "No pyramid was found" in str(fuse_report(without_pyramid()))
