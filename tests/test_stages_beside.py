# SPDX-License-Identifier: BSD-3-Clause
"""Stages of branches side by side: at once where they are alike, and what each alone computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aspp_pairs import TIGHT, assert_all_close
from torch import Tensor, nn

from aspp_ext.modules.stages import run_beside

WIDTHS = (8, 4, 12)


def group(width: int, size: int = 2, **settings: Any) -> nn.Module:
    return nn.GroupNorm(width // size, width, **settings)


def instance(width: int, **settings: Any) -> nn.Module:
    return nn.InstanceNorm2d(width, **settings)


def prelus() -> list[nn.Module]:
    return [nn.PReLU(), nn.PReLU(4, 0.1), nn.PReLU(1, -0.2)]


def of(make: Callable[..., nn.Module], **settings: Any) -> Callable[[], list[nn.Module]]:
    return lambda: [make(width, **settings) for width in WIDTHS]


def but_last(make: Callable[..., nn.Module], **settings: Any) -> Callable[[], list[nn.Module]]:
    return lambda: [*(make(width) for width in WIDTHS[:2]), make(WIDTHS[2], **settings)]


AT_ONCE = {
    "group": of(group),
    "group, not affine": of(group, affine=False),
    "group, eps": of(group, eps=0.1),
    "instance": of(instance),
    "instance, affine": of(instance, affine=True),
    "PReLU": prelus,
}
ONE_BY_ONE = {
    "groups of other sizes": but_last(group, size=4),
    "group, other eps": but_last(group, eps=0.1),
    "group, one not affine": but_last(group, affine=False),
    "instance with statistics": of(instance, track_running_stats=True),
    "instance and group": lambda: [group(8, 1), instance(4, affine=True), instance(12)],
    "PReLU and LeakyReLU": lambda: [*prelus()[:2], nn.LeakyReLU()],
}


@pytest.fixture
def called(monkeypatch) -> list[str]:
    """The names of what runs on all branches' channels."""
    names: list[str] = []

    def watch(name: str) -> None:
        plain = getattr(F, name)

        def noting(y: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
            if y.shape[1] == sum(WIDTHS):
                names.append(name)
            return plain(y, *arguments, **keywords)

        monkeypatch.setattr(F, name, noting)

    for name in ("group_norm", "instance_norm", "prelu"):
        watch(name)
    return names


def results(
    stages: list[nn.Module], y: Tensor, run: Callable[[list[nn.Module], Tensor], Tensor]
) -> dict[str, Any]:
    stages, y = copy.deepcopy(stages), y.clone().requires_grad_()
    out = run(stages, y.clone())
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
    grads = {f"{i}.{n}": p.grad for i, s in enumerate(stages) for n, p in s.named_parameters()}
    return {"out": out.detach(), "grad": y.grad, **grads}


def alone(stages: list[nn.Module], y: Tensor) -> Tensor:
    return torch.cat([s(p) for s, p in zip(stages, y.split(WIDTHS, 1), strict=True)], 1)


def beside(stages: list[nn.Module], y: Tensor) -> Tensor:
    return run_beside([[s] for s in stages], y, WIDTHS, channels_last=[True] * 3)


@pytest.mark.parametrize("name", [*AT_ONCE, *ONE_BY_ONE])
def test_what_each_alone_computes(name: str, called: list[str]) -> None:
    torch.manual_seed(0)
    stages = [stage.double() for stage in (AT_ONCE | ONE_BY_ONE)[name]()]
    for p in (p for stage in stages for p in stage.parameters()):
        p.data.uniform_(-1, 1)
    y = torch.randn(2, sum(WIDTHS), 5, 7, dtype=torch.double).to(memory_format=torch.channels_last)
    expected = results(stages, y, alone)
    called.clear()
    got = results(stages, y, beside)
    assert_all_close(got, expected, **TIGHT)
    assert len(called) == (name in AT_ONCE)


def test_weights_that_are_not_their_channels_raise_as_alone() -> None:
    stages = [group(8), group(4), group(12)]
    stages[0].weight, stages[1].weight = stages[1].weight, stages[0].weight
    with pytest.raises(RuntimeError):
        beside(stages, torch.randn(1, sum(WIDTHS), 3, 3))
