# SPDX-License-Identifier: BSD-3-Clause
"""Taps that no pixel of the map reaches: their gradients are zeros, whatever was in memory, and
those of the others are right. oneDNN writes none in bfloat16 where kernels are 5x5 or larger."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from marks import on_cpu
from table import LOW, dtype_id

import aspp_ext
from aspp_ext.testing import laid_out

pytestmark = [on_cpu, pytest.mark.settings("isa", "unfiltered")]
SIZES = [(1, 1), (1, 9), (2, 17), (1, 65), (9, 1), (2, 2), (3, 9), (65, 2)]
KERNELS = [(3, 3), (5, 5), (7, 7), (9, 9), (1, 11), (7, 3)]
DTYPES = (torch.float32, torch.float64, *LOW)


def fill_memory() -> None:
    """So that what is not written shows."""
    for power in range(8, 20):
        torch.full((1 << power,), torch.nan)


@pytest.mark.quick(when=lambda dtype: dtype == torch.bfloat16)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("separable", [False, True])
def test_gradients_by_taps_beyond_the_map(separable, dtype, layout) -> None:
    """128 input channels take oneDNN's way in question."""
    c, o = (128, 16) if not separable else (16, 8)
    for size, kernel, rate in itertools.product(SIZES, KERNELS, (1, 6)):
        torch.manual_seed(1)
        x = laid_out(torch.randint(-1, 2, (1, c, *size)).to(dtype), layout).requires_grad_()
        grad = torch.randint(-1, 2, (1, o, *size)).to(dtype)
        shape = (c, 1, *kernel) if separable else (o, c, *kernel)
        w, one = torch.ones(shape).to(dtype).requires_grad_(), torch.ones(o, c, 1, 1).to(dtype)
        fill_memory()
        if separable:
            y = aspp_ext.atrous_separable_pyramid(x, [w], [one], [rate])
        else:
            y = aspp_ext.atrous_pyramid(x, [w], [rate])
        got = torch.autograd.grad(y, (x, w), grad)
        wide, w64 = (t.detach().double().requires_grad_() for t in (x, w))
        padding = [rate * (k // 2) for k in kernel]
        y = F.conv2d(wide, w64, padding=padding, dilation=rate, groups=c if separable else 1)
        y = F.conv2d(y, one.double()) if separable else y
        for g, e in zip(got, torch.autograd.grad(y, (wide, w64), grad.double()), strict=True):
            assert torch.equal(g, e.to(dtype)), (size, kernel, rate)
