# SPDX-License-Identifier: BSD-3-Clause
"""Sums over many pixels or channels, on maps that are flat, wide, tall or a pixel: no chain of
additions is so long that it loses more digits than PyTorch's sums, which are cut, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from marks import on_cpu
from torch import Tensor

import aspp_ext
from aspp_ext.testing import laid_out

pytestmark = [on_cpu, pytest.mark.settings("isa")]
LAYOUTS = ("contiguous", "channels_last")
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def error_ratio(run: Callable[[torch.dtype, bool, int], Sequence[Tensor]], draws: int = 8) -> float:
    """The worst of the results' errors in float32 as multiples of PyTorch's, over several draws.

    Args:
        run: ``(dtype, ours, seed)``, the results.
    """
    ours, theirs = [], []
    for seed in range(draws):
        exact = run(torch.float64, False, seed)
        for errors, got in (
            (ours, run(torch.float32, True, seed)),
            (theirs, run(torch.float32, False, seed)),
        ):
            errors.append(torch.stack([(g - e).norm() for g, e in zip(got, exact, strict=True)]))
    return (torch.stack(ours).sum(0) / torch.stack(theirs).sum(0)).max().item()


POOLED = [(64, 1, 500), (64, 1, 570), (64, 500, 1), (64, 20, 280), (64, 1, 4096)]
POOLED += [(636, 1, 1), (2048, 1, 1), (636, 17, 17)]


@each_layout
@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("shape", POOLED, ids=lambda s: "x".join(map(str, s)))
def test_the_pooled_branch(shape, separable, layout) -> None:
    """Alone: the columns of the others in the projection are zero."""
    c, pooled, projected = shape[0], 32, 16

    def run(dtype: torch.dtype, ours: bool, seed: int) -> Sequence[Tensor]:
        torch.manual_seed(seed)
        x = laid_out(1 + torch.randn(2, *shape), layout)
        weight, shift = torch.randn(pooled, c) / c**0.5, torch.randn(pooled)
        project = torch.randn(projected, pooled) / pooled**0.5
        x, weight, shift, project = (t.to(dtype) for t in (x, weight, shift, project))
        bias = torch.full((projected,), 3, dtype=dtype)
        if not ours:
            hidden = F.conv2d(F.adaptive_avg_pool2d(x, 1), weight[:, :, None, None], shift)
            return [F.conv2d(hidden.relu(), project[:, :, None, None], bias).relu()]
        branch = (x.new_ones(c, 1, 3, 3) if separable else None, x.new_ones(8, c, 1, 1))
        every = torch.cat([x.new_zeros(projected, 8), project], 1)
        rest = (x.new_zeros(8), weight, shift, every, bias)
        return [aspp_ext.aspp_inference(x, *([b] for b in branch), [2], *rest)[:, :, :1, :1]]

    assert error_ratio(run) < 2


MAPS = [(4096, 1), (1, 4096), (2048, 2), (12000, 1), (33, 33), (256, 256)]


@each_layout
@pytest.mark.parametrize("size", MAPS, ids=lambda s: "x".join(map(str, s)))
def test_gradients_that_are_sums_over_pixels(size, layout) -> None:
    """Of depthwise and pointwise weights and of what is between."""
    c, rate = 16, 6

    def run(dtype: torch.dtype, ours: bool, seed: int) -> Sequence[Tensor]:
        torch.manual_seed(seed)
        x, grad = laid_out(torch.randn(1, c, *size) + 0.5, layout), torch.randn(1, 16, *size)
        leaves = [torch.randn(s) for s in ((c, 1, 3, 3), (16, c, 1, 1), (c,), (c,))]
        x, grad, *leaves = (t.to(dtype) for t in (x, grad, *leaves))
        d, p, scale, shift = (t.requires_grad_() for t in leaves)
        if ours:
            between = {"between": [(scale, shift)], "between_activation": "relu"}
            y = aspp_ext.atrous_separable_pyramid(x, [d], [p], [rate], **between)
        else:
            y = F.conv2d(x, d, padding=rate, dilation=rate, groups=c)
            y = F.conv2d((y * scale[:, None, None] + shift[:, None, None]).relu(), p)
        return torch.autograd.grad(y, [d, p, scale, shift], grad)

    assert error_ratio(run, 4) < 2
