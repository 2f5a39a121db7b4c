# SPDX-License-Identifier: BSD-3-Clause
"""How the results of described pyramids lie in memory, where one branch lies otherwise."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from aspp_ext.fuse import fuse, fuse_report

JOINS = {
    "list": lambda ys: ys,
    "pair": lambda ys: (torch.cat(ys[:2], 1), ys[2]),
    "cat": lambda ys: torch.cat(ys, 1),
    "sum": sum,
    "dropout": lambda ys: nn.functional.dropout(torch.cat(ys, 1), 0.5),
}


class Branches(nn.Module):
    def __init__(self, join: str) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 8, 3, padding=r, dilation=r), nn.BatchNorm2d(8), nn.ReLU())
            for r in (1, 2, 4)
        )
        self.join = join

    def forward(self, x: Tensor) -> list[Tensor] | tuple[Tensor, ...] | Tensor:
        return JOINS[self.join]([branch(x) for branch in self.branches])


@pytest.mark.parametrize("mode", ["inference", "eval", "training"])
@pytest.mark.parametrize("one", [0, 1])
@pytest.mark.parametrize("join", JOINS)
def test_one_branch_in_channels_last(join: str, one: int, mode: str) -> None:
    original = Branches(join).double()
    ours = fuse(copy.deepcopy(original))
    assert [e.reason for e in fuse_report(ours)] == [None]
    x = torch.randn(2, 16, 9, 7, dtype=torch.float64)
    for module in (original, ours):
        module.branches[one].to(memory_format=torch.channels_last)
        module.train(mode == "training")
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        results = []
        for module in (original, ours):
            torch.manual_seed(0)
            with torch.set_grad_enabled(mode != "inference"):
                found = module(given)
            results.append([found] if isinstance(found, Tensor) else list(found))
        for expected, got in zip(*results, strict=True):
            assert got.stride() == expected.stride()
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
