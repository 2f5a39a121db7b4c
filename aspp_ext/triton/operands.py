# SPDX-License-Identifier: BSD-3-Clause
"""From tensors in any format to the operands of the kernels, and from what they write to tensors.

Kernels read rows of channels, one per pixel or tap, that begin at multiples of 16 bytes and are
zero up to the next one. What already lies that way is used in place.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.formats import empty_image, is_channels_last
from .transpose import transpose

MAX_ELEMENTS = 2**31 - 2**10
"""Of a weight, or of a pixel: kernels count within it in 32 bits, to the end of the last tile."""


class Rows(NamedTuple):
    """Channels of pixels: ``data`` begins with pixel 0, rows are ``chunks`` of 16 bytes apart."""

    data: Tensor
    chunks: int


def check_limit(elements: int, of: str) -> None:
    """Refuses more than the kernels can count ``of`` a "weight" or a "pixel".

    Raises:
        RuntimeError: there are.
    """
    if elements > MAX_ELEMENTS:
        raise RuntimeError(
            f"aspp_ext: elements of a {of} go up to {MAX_ELEMENTS} with Triton, got {elements}"
        )


def chunk(dtype: torch.dtype) -> int:
    """Elements in 16 bytes."""
    return 16 // dtype.itemsize


def chunks(channels: int, dtype: torch.dtype) -> int:
    """Whole chunks that hold so many channels."""
    return -(-channels // chunk(dtype))


def _is_aligned(t: Tensor) -> bool:
    return t.data_ptr() % 16 == 0


def _pixel_pitch(x: Tensor) -> int | None:
    """How many elements the pixels of x are apart where its channels are neighbours."""
    n, c, h, w = x.shape
    pitch = x.stride(3) if w > 1 else x.stride(2) if h > 1 else x.stride(0) if n > 1 else c
    expected = (h * w * pitch, 1, w * pitch, pitch)
    fits = all(
        size == 1 or stride == want
        for size, stride, want in zip(x.shape, x.stride(), expected, strict=True)
    )
    return pitch if fits and c <= pitch <= MAX_ELEMENTS else None


def image(x: Tensor) -> Rows:
    """``[N, C, H, W]`` as rows of C channels."""
    n, c, h, w = x.shape
    step = chunk(x.dtype)
    check_limit(c, "pixel")
    pitch = _pixel_pitch(x)
    if c % step == 0 and pitch is not None and pitch % step == 0 and _is_aligned(x):
        return Rows(x, pitch // step)
    count = chunks(c, x.dtype)
    data = torch.empty((n, h, w, count * step), dtype=x.dtype, device=x.device)
    _channels_last(x, data, count * step)
    return Rows(data, count)


def _channels_last(t: Tensor, data: Tensor, padded: int) -> None:
    """Writes ``[B, C, h, w]`` to ``[B, h, w, ...]``, beyond C zeros up to ``padded``."""
    b, c, h, w = t.shape
    if (w > 1 and t.stride(3) != 1) or (h > 1 and t.stride(2) != w):
        t = t.contiguous()
    steps = (t.stride(0), t.stride(1))
    transpose(t, data, (b, c, h * w), steps, (data.stride(0), data.stride(2)), padded)


def _firsts(widths: Sequence[int], dtype: torch.dtype) -> tuple[list[int], int]:
    """Where branches begin, in chunks, if each begins with one; and where the last one ends."""
    *firsts, end = itertools.accumulate((chunks(w, dtype) for w in widths), initial=0)
    check_limit(end * chunk(dtype), "pixel")
    return firsts, end


def branch_image(grad: Tensor, widths: Sequence[int]) -> tuple[Rows, list[int]]:
    """``[N, sum widths, H, W]`` with each branch's channels at a chunk, and those chunks."""
    firsts, end = _firsts(widths, grad.dtype)
    step = chunk(grad.dtype)
    if all(w % step == 0 for w in widths):
        return image(grad), firsts
    n, _, h, w = grad.shape
    data = torch.empty((n, h, w, end * step), dtype=grad.dtype, device=grad.device)
    for part, first in zip(grad.split(list(widths), 1), firsts, strict=True):
        padded = chunks(part.size(1), grad.dtype) * step
        _channels_last(part, data[..., first * step :], padded)
    return Rows(data, end), firsts


def weight(w: Tensor) -> Tensor:
    """``[O, C, kh, kw]`` as ``[O, kh * kw, C]`` with C up to a whole chunk."""
    o, c, kh, kw = w.shape
    padded = chunks(c, w.dtype) * chunk(w.dtype)
    check_limit(o * kh * kw * padded, "weight")
    rows = w.permute(0, 2, 3, 1)
    if c % chunk(w.dtype) == 0 and rows.is_contiguous() and _is_aligned(w):
        return rows.view(o, kh * kw, c)
    data = torch.empty((o, kh, kw, padded), dtype=w.dtype, device=w.device)
    _channels_last(w, data, padded)
    return data.view(o, kh * kw, padded)


def out_rows(like: Tensor, pixels: int, widths: Sequence[int]) -> tuple[Rows, list[int]]:
    """Memory for a result whose branches have these widths, and the chunks they begin at."""
    firsts, end = _firsts(widths, like.dtype)
    size = (pixels, end * chunk(like.dtype))
    return Rows(torch.empty(size, dtype=like.dtype, device=like.device), end), firsts


def to_image(
    rows: Rows,
    firsts: Sequence[int],
    widths: Sequence[int],
    like: Tensor,
    sources: Sequence[Tensor],
) -> Tensor:
    """The result ``[N, sum widths, H, W]``, of like's N, H and W, channels_last if a source is."""
    n, _, h, w = like.shape
    step = chunk(like.dtype)
    data = rows.data.view(n, h, w, rows.chunks * step).permute(0, 3, 1, 2)
    is_whole = data.size(1) == sum(widths)
    if is_whole and any(is_channels_last(t) for t in sources):
        return data
    result = empty_image(like, sum(widths), sources)
    if is_channels_last(result):
        for first, part in zip(firsts, result.split(list(widths), 1), strict=True):
            part.copy_(data[:, first * step : first * step + part.size(1)])
        return result
    for first, part in zip(firsts, result.split(list(widths), 1), strict=True):
        _channels_first(data[:, first * step :], part)
    return result


def _channels_first(data: Tensor, t: Tensor) -> None:
    """Writes channels_last ``[B, ..., h, w]`` to the planes of ``[B, C, h, w]``."""
    b, c, h, w = t.shape
    size = (b, h * w, c)
    transpose(data, t, size, (data.stride(0), data.stride(3)), (t.stride(0), t.stride(1)))


def to_weight(rows: Tensor, channels: int, kernel: tuple[int, int]) -> Tensor:
    """``[O, kh * kw, C up to a whole chunk]`` as ``[O, C, kh, kw]``, contiguous."""
    o, taps, pitch = rows.shape
    if taps == 1 and pitch == channels:
        return rows.view(o, channels, *kernel)
    w = rows.new_empty(o, channels, *kernel)
    transpose(rows, w, (o, taps, channels), (taps * pitch, pitch), (channels * taps, taps))
    return w
