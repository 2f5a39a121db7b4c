# SPDX-License-Identifier: BSD-3-Clause
"""The dense pyramid's operators (csrc/library.cpp), of arguments that have been checked.

``polyphase`` is the CPU's and changes nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..dispatch import pairs
from ..ops.formats import empty_image
from . import launches, operands
from .launches import PLAIN, Epilogue, Statistics
from .work import Branch, Shape


def _shape(
    x: Tensor, channels: int, kernels: Sequence[Any], rates: list[int], widths: Sequence[int]
) -> Shape:
    n, _, h, w = x.shape
    return Shape(n, h, w, channels, tuple(zip(kernels, pairs(rates), widths, strict=True)))


def _kernel(weight: Tensor) -> tuple[int, int]:
    return weight.size(2), weight.size(3)


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    rates: list[int],
    tf32: bool,
    epilogue: Epilogue,
    statistics: bool,
) -> tuple[Tensor, Statistics | None]:
    widths = [w.size(0) for w in weights]
    shape = _shape(x, x.size(1), [_kernel(w) for w in weights], rates, widths)
    if shape.pixels == 0:
        return empty_image(x, sum(widths), [x, *weights]), None
    packed = [operands.weight(w) for w in weights]
    out, firsts = operands.out_rows(x, shape.pixels, widths)
    chunks = operands.chunks(x.size(1), x.dtype)
    branches = [
        Branch(
            a_extent=chunks,
            taps=w.size(1),
            out_first=first,
            out_extent=operands.chunks(width, x.dtype),
            rows=width,
            vector=sum(widths[:b]),
        )
        for b, (w, first, width) in enumerate(zip(packed, firsts, widths, strict=True))
    ]
    found = launches.gather(
        "forward", operands.image(x), packed, out, shape, branches, tf32, epilogue, statistics
    )
    return operands.to_image(out, firsts, widths, x, [x, *weights]), found


def atrous_pyramid(
    x: Tensor,
    weights: Sequence[Tensor],
    rates: list[int],
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
    tf32: bool = False,
    polyphase: int = 1,
) -> Tensor:
    """``[N, sum O, H, W]``."""
    return _forward(x, weights, rates, tf32, Epilogue(scale, shift, relu), False)[0]


def atrous_pyramid_statistics(
    x: Tensor, weights: Sequence[Tensor], rates: list[int], tf32: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The result of at least one sample, and the mean and the sum of squared differences from it
    of each channel."""
    y, found = _forward(x, weights, rates, tf32, PLAIN, True)
    assert found is not None
    return y, *found.combined(y.size(1))


def atrous_pyramid_grad_input(
    grad: Tensor,
    weights: Sequence[Tensor],
    rates: list[int],
    tf32: bool = False,
    polyphase: int = 1,
) -> Tensor:
    """``[N, C, H, W]``."""
    widths, channels = [w.size(0) for w in weights], weights[0].size(1)
    shape = _shape(grad, channels, [_kernel(w) for w in weights], rates, widths)
    sources = [grad, *weights]
    if shape.pixels == 0:
        return empty_image(grad, channels, sources)
    packed = [operands.weight(w) for w in weights]
    a, a_firsts = operands.branch_image(grad, widths)
    out, firsts = operands.out_rows(grad, shape.pixels, [channels])
    branches = [
        Branch(
            a_first=first,
            a_extent=operands.chunks(width, grad.dtype),
            taps=w.size(1),
            out_extent=operands.chunks(channels, grad.dtype),
            rows=width,
        )
        for w, first, width in zip(packed, a_firsts, widths, strict=True)
    ]
    launches.gather("grad_input", a, packed, out, shape, branches, tf32)
    return operands.to_image(out, firsts, [channels], grad, sources)


def atrous_pyramid_grad_weight(
    grad: Tensor,
    x: Tensor,
    kernels: list[int],
    out_channels: list[int],
    rates: list[int],
    tf32: bool = False,
    polyphase: int = 1,
) -> list[Tensor]:
    """Per branch ``[O, C, kh, kw]``."""
    channels, sizes = x.size(1), pairs(kernels)
    shape = _shape(x, channels, sizes, rates, out_channels)
    if shape.pixels == 0:
        return [x.new_zeros(o, channels, *k) for o, k in zip(out_channels, sizes, strict=True)]
    a, a_firsts = operands.branch_image(grad, out_channels)
    b = operands.image(x)
    padded = operands.chunks(channels, x.dtype) * operands.chunk(x.dtype)
    outs = [
        x.new_empty(o, kh * kw, padded) for o, (kh, kw) in zip(out_channels, sizes, strict=True)
    ]
    branches = [
        Branch(a_first=first, a_extent=operands.chunks(o, x.dtype), taps=kh * kw, rows=o)
        for first, o, (kh, kw) in zip(a_firsts, out_channels, sizes, strict=True)
    ]
    launches.grad_weight(a, b, outs, shape, branches, tf32)
    return [operands.to_weight(out, channels, k) for out, k in zip(outs, sizes, strict=True)]
