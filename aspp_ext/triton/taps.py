# SPDX-License-Identifier: BSD-3-Clause
"""Sums over the taps of depthwise weights, each channel with itself, in float32.

A pixel's channels are read in words: bfloat16 two at a time, because the compiler takes three
instructions to widen two of them and an integer's halves take two. The offsets of the taps are kept
up to date by additions; products would be a third of the loop's instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .records import RUN, run_blocks, run_steps, run_taps

BLOCK = tl.constexpr(64)
"""Rows of packed weights are multiples of so many channels: they hold whole tiles."""


@triton.jit
def region_padded(region):
    """Of a region: whether a tap may read outside the map in it."""
    return tl.load(region + 6) != 0


@triton.jit
def words(pointer):
    """The pointer to channels as one to words."""
    if pointer.dtype.element_ty == tl.bfloat16:
        return pointer.to(tl.pointer_type(tl.int32), bitcast=True)
    else:
        return pointer


@triton.jit
def widened(loaded, M: tl.constexpr, K: tl.constexpr):
    """Words of ``[M, K]`` as float32."""
    if loaded.dtype == tl.int32:
        even = (loaded << 16).to(tl.float32, bitcast=True)
        odd = (loaded & -65536).to(tl.float32, bitcast=True)
        return tl.reshape(tl.join(even, odd), (M, K))
    else:
        return loaded.to(tl.float32)


@triton.jit
def add_taps(
    sums,  # [M, K] float32
    source,  # words, see above; of the first channel
    at,  # [M] int64: a pixel's place in source
    inside,  # of the words of a row; MASKED only, as y and x
    y,  # [M]
    x,  # [M]
    weights,  # [taps, weight_pitch] float32, of the first channel
    run,  # the record
    skip,  # taps of the run that are left out
    count,  # and those that are taken
    height,
    width,
    pitch,  # from pixel to pixel, in words
    weight_pitch,
    M: tl.constexpr,
    K: tl.constexpr,
    TAPS: tl.constexpr,  # whose loads are in flight together
    MASKED: tl.constexpr,  # whether a tap may read outside the map, or beyond the channels
):
    """``sums + sum over taps of source[pixel + tap] * weights[tap]``."""
    _branch, index, dy, dx, columns = run_taps(run)
    index_step, dy_step, dx_step = run_steps(run)
    row = skip // columns
    column = skip - row * columns
    dy += row * dy_step
    dx += column * dx_step
    dx_back = (columns - 1) * dx_step
    step = dx_step.to(tl.int64) * pitch
    wrap = (dy_step * width - dx_back).to(tl.int64) * pitch
    move = (dy * width + dx).to(tl.int64) * pitch
    weight_step = weight_pitch * 1
    weight_wrap = weight_pitch * (index_step - columns + 1)
    weight_at = weight_pitch * (index + row * index_step + column)
    lanes = tl.arange(0, K)
    PER_ROW: tl.constexpr = K // 2 if source.dtype.element_ty == tl.int32 else K
    of_row = tl.arange(0, PER_ROW)
    for _tap in tl.range(0, count, loop_unroll_factor=TAPS):
        places = source + move + (at[:, None] + of_row[None, :])
        if MASKED:
            yy = (y + dy).to(tl.uint32)
            xx = (x + dx).to(tl.uint32)
            live = (yy < height.to(tl.uint32)) & (xx < width.to(tl.uint32))
            loaded = tl.load(places, mask=live[:, None] & inside[None, :], other=0)
        else:
            loaded = tl.load(places)
        weight = tl.load(weights + weight_at + lanes)
        sums += widened(loaded, M, K) * weight[None, :]
        column += 1
        wraps = column == columns
        column = tl.where(wraps, 0, column)
        move += tl.where(wraps, wrap, step)
        weight_at += tl.where(wraps, weight_wrap, weight_step)
        if MASKED:
            dy += tl.where(wraps, dy_step, 0)
            dx += tl.where(wraps, -dx_back, dx_step)
    return sums


@triton.jit
def sum_taps(
    source,
    at,
    inside,
    y,
    x,
    weights,
    runs,
    run_begin,
    run_end,
    height,
    width,
    pitch,
    weight_pitch,
    M: tl.constexpr,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The sum over all taps of a region; see :func:`add_taps`."""
    sums = tl.zeros((M, K), tl.float32)
    for s in range(run_begin, run_end):
        run = runs + s * RUN
        _first, _blocks, count = run_blocks(run)
        sums = add_taps(
            sums, source, at, inside, y, x, weights, run, 0, count, height, width, pitch,
            weight_pitch, M, K, TAPS, MASKED,
        )  # fmt: skip
    return sums


@triton.jit
def between(sums, scale, shift, relu):
    """``relu(sums * scale + shift)`` of columns ``[K]``; a NaN stays one."""
    z = sums * scale[None, :] + shift[None, :]
    least = tl.where(relu != 0, 0.0, float("-inf"))
    return tl.maximum(z, least, propagate_nan=tl.PropagateNan.ALL)
