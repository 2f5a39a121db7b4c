# SPDX-License-Identifier: BSD-3-Clause
"""Pyramids whose forwards nobody can read, and how often their branches are computed together."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from aspp_pairs import TIGHT
from torch import Tensor, nn
from zoo.units import unit

from aspp_ext.fuse import fuse
from aspp_ext.modules import siblings
from aspp_ext.modules.siblings import MEMBER, switch

CHANNELS = 12
SHAPE = (2, CHANNELS, 9, 11)


class SizesAsNumbers(nn.Module):
    """``int()`` of the sizes; biases, ReLUs that write over their maps."""

    def __init__(self, rates: tuple[int, ...] = (1, 2, 3, 6), w: int = 8) -> None:
        super().__init__()
        self.branches = nn.ModuleList(unit(CHANNELS, w, 3, r, bias=r < 4) for r in rates)
        for branch in self.branches:
            branch[2] = nn.ReLU(inplace=True)
        self.pooled = nn.Conv2d(CHANNELS, w, 1)
        self.project = nn.Conv2d(w * (len(rates) + 1), w, 1)
        self.wanted = set(range(len(rates)))

    def forward(self, x: Tensor) -> Tensor:
        size = (int(x.shape[2]), int(x.shape[3]))
        ys = [branch(x) for i, branch in enumerate(self.branches) if i in self.wanted]
        ys += [ys[0]] * (len(self.branches) - len(ys))
        pooled = F.interpolate(self.pooled(F.avg_pool2d(x, size)), size)
        return self.project(torch.cat([*ys, pooled], 1))


class CumulativeNorms(SizesAsNumbers):
    """Norms that count their batches."""

    def __init__(self) -> None:
        super().__init__()
        for branch in self.branches:
            branch[1].momentum = None

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooled(F.adaptive_avg_pool2d(x, 1)).expand(-1, -1, *x.shape[2:])
        return self.project(torch.cat([*(branch(x) for branch in self.branches), pooled], 1))


class SharedPointwise(SizesAsNumbers):
    """The 1x1 reads the map and the pooled map."""

    def forward(self, x: Tensor) -> Tensor:
        size = (int(x.shape[2]), int(x.shape[3]))
        pooled = F.interpolate(self.pooled(F.avg_pool2d(x, size)), size)
        ys = [branch(x) for branch in self.branches[:-1]]
        return self.project(torch.cat([self.pooled(x), *ys, pooled], 1))


class TwoPyramids(nn.Module):
    """One behind the other, in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = SizesAsNumbers((2, 3)), SizesAsNumbers((1, 2, 4))
        self.between = nn.Conv2d(8, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


class Flat(nn.Module):
    """Two groups of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(CHANNELS, 8, 3, padding=r, dilation=r) for r in (2, 3))
        self.c, self.d = (nn.Conv2d(8, 8, 3, padding=r, dilation=r) for r in (2, 5))

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.a(x) * int(x.shape[2]) + self.b(x)
        return [self.c(y), self.d(y)]


UNREAD: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind for kind in (SizesAsNumbers, CumulativeNorms, SharedPointwise, TwoPyramids)
}


def pair(make: Callable[[], nn.Module] = SizesAsNumbers) -> tuple[nn.Module, nn.Module]:
    """The same module unfused and fused, in float64 and eval mode."""
    torch.manual_seed(0)
    plain = make().double().eval()
    fused = copy.deepcopy(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse(fused)
    return plain, fused


def maps(*shape: int) -> Tensor:
    return torch.randn(shape or SHAPE, dtype=torch.float64)


RATES = (1, 2, 3)


class Convolutions(nn.Module):
    """Three of one map, and what happens between them."""

    def __init__(self, between: Callable[..., object] | None = None) -> None:
        super().__init__()
        convs = (nn.Conv2d(CHANNELS, 8, 3, padding=r, dilation=r, bias=r > 1) for r in RATES)
        self.a, self.b, self.c = convs
        self.between = between or (lambda module, x: None)

    def forward(self, x: Tensor) -> list[Tensor]:
        a = self.a(x)
        self.between(self, x)
        return [a, self.b(x), self.c(x)]


def both(between: Callable[..., object] | None = None) -> tuple[Convolutions, Convolutions]:
    """A module, and one whose convolutions are siblings, in float64."""
    torch.manual_seed(0)
    plain = Convolutions(between).double()
    fused = copy.deepcopy(plain)
    switch(fused, [["a", "b", "c"]], "")
    return plain, fused


def check_alike(plain: nn.Module, fused: nn.Module, x: Tensor | None = None, **tolerance) -> None:
    """Results, their strides and whether they have gradients."""
    x = maps() if x is None else x
    for got, expected in zip(fused(x.clone()), plain(x.clone()), strict=True):
        torch.testing.assert_close(got, expected, **(tolerance or TIGHT))
        assert got.stride() == expected.stride()
        assert (got.requires_grad, got.dtype) == (expected.requires_grad, expected.dtype)
        assert got.is_inference() == expected.is_inference()
        assert x.dim() != 4 or not got._is_view()


def waiting(conv: nn.Module) -> dict[int, object]:
    """The parts that wait for the siblings of ``conv``, in this thread."""
    return vars(conv)[MEMBER].siblings._local.round.parts


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each call of the pyramid by siblings, how many it has computed."""
    counts: list[int] = []
    plain = siblings.atrous_pyramid

    def counted(x: Tensor, weights: list[Tensor], *rest: object, **keywords: object) -> Tensor:
        counts.append(len(weights))
        return plain(x, weights, *rest, **keywords)

    monkeypatch.setattr(siblings, "atrous_pyramid", counted)
    return counts
