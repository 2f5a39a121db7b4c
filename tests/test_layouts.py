# SPDX-License-Identifier: BSD-3-Clause
"""The dense pyramid on operands that lie in memory in every way a tensor can: the same bits."""

from __future__ import annotations

import random

import pytest
import torch
from marks import (
    on_all,
    on_native,
    proven_interpreted,
    quick_emulated,
    quick_interpreted,
    sanitized,
    varied,
)
from table import FAMILY, dtype_id

from aspp_ext import reference

pytestmark = [on_all, proven_interpreted, varied, sanitized]

RATES = [1, 1, 2, 1, 1, 3]
OUT_CHANNELS = [16, 5, 8]
KERNELS = [(1, 1), (3, 3), (1, 3)]


def strided(sizes: list[int], order: list[int], gaps: list[int], offset: int) -> torch.Tensor:
    """Zeros with the dimensions in `order` from the outermost in, each `gaps` elements too long."""
    strides, step = [0] * 4, 1
    for dimension in reversed(order):
        strides[dimension] = step
        step *= sizes[dimension] + gaps[dimension]
    return torch.full((step + offset,), torch.nan).as_strided(sizes, strides, offset).zero_()


def layouts(sizes: list[int]) -> dict[str, torch.Tensor]:
    plain, none = [0, 1, 2, 3], [0] * 4
    last, chooser = [0, 2, 3, 1], random.Random(0)
    result = {
        "contiguous": strided(sizes, plain, none, 0),
        "channels_last": strided(sizes, last, none, 0),
        "misaligned": strided(sizes, last, none, 1),
        "misaligned rows": strided(sizes, plain, none, 3),
        "channels of a wider image": strided(sizes, last, [0, 8, 0, 0], 16),
        "channels of an odd image": strided(sizes, last, [0, 3, 0, 0], 0),
        "channels of planes": strided(sizes, plain, [0, 2, 0, 0], 0),
        "columns of a wider image": strided(sizes, plain, [0, 0, 0, 2], 0),
        "rows of a higher image": strided(sizes, last, [0, 0, 3, 0], 0),
        "columns before rows": strided(sizes, [0, 1, 3, 2], none, 0),
        "pixels outside": strided(sizes, [2, 3, 0, 1], none, 0),
    }
    for i in range(4):
        order = chooser.sample(plain, 4)
        result[f"random {i}"] = strided(sizes, order, chooser.choices([0, 0, 1, 8], k=4), i)
    return result


def integers(sizes: list[int]) -> torch.Tensor:
    return torch.randint(-2, 3, sizes).float()


def filled(layout: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values` with the layout's strides; every element between them is NaN."""
    storage = torch.full((layout.untyped_storage().size() // 4,), torch.nan, dtype=dtype)
    result = storage.as_strided(layout.size(), layout.stride(), layout.storage_offset())
    return result.copy_(values)


@quick_emulated(lambda batch, size: (batch, size) == (3, (4, 6)))
@quick_interpreted(
    lambda batch, size, channels, dtype: (
        (batch, *size, channels, dtype) == (1, 4, 6, 5, torch.float32)
    )
)
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float64, marks=on_native)],
    ids=dtype_id,
)
@pytest.mark.parametrize("channels", [16, 5, 1])
@pytest.mark.parametrize("size", [(4, 6), (1, 6), (5, 1), (1, 1)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_layout_gives_the_same_bits(batch, size, channels, dtype) -> None:
    x = integers([batch, channels, *size])
    weights = [
        integers([o, channels, *kernel]) for o, kernel in zip(OUT_CHANNELS, KERNELS, strict=True)
    ]
    grad = integers([batch, sum(OUT_CHANNELS), *size])
    pairs = [(RATES[2 * b], RATES[2 * b + 1]) for b in range(len(weights))]
    leaves = [t.double().requires_grad_() for t in (x, *weights)]
    out = reference.atrous_pyramid(leaves[0], leaves[1:], pairs)
    grad_x, *grad_weights = torch.autograd.grad(out, leaves, grad.double())
    kernels = [side for kernel in KERNELS for side in kernel]
    for name, layout in layouts(list(x.shape)).items():
        given = filled(layout, x, dtype)
        own = [filled(layouts(list(w.shape))[name], w, dtype) for w in weights]
        back = filled(layouts(list(grad.shape))[name], grad, dtype)
        got = FAMILY.op("atrous_pyramid")(given, own, RATES)
        assert torch.equal(got, out.to(dtype)), name
        got = FAMILY.op("atrous_pyramid_grad_input")(back, own, RATES)
        assert torch.equal(got, grad_x.to(dtype)), name
        grad_weight = FAMILY.op("atrous_pyramid_grad_weight")
        results = grad_weight(back, given, kernels, OUT_CHANNELS, RATES)
        for got, expected in zip(results, grad_weights, strict=True):
            assert got.is_contiguous()
            assert torch.equal(got, expected.to(dtype)), name
