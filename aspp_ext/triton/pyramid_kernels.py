# SPDX-License-Identifier: BSD-3-Clause
"""The dense pyramid: forward, gradient of the input and gradient of the weights as GEMMs.

A program computes one unit of a planner's work list. A row of the left operand is a pixel, a tap
moves all rows by one offset, so all branches and rates are one launch. Memory is channels last
throughout: pixels in rows of channels, weights ``[O, taps, C]``. Rows begin at multiples of 16
bytes and are zero up to the next one: widths come in chunks of 16 bytes, which lets the compiler
load so many at a time.

Sums are in float32. A sum that the plan cuts into slices goes to ``partials`` slice by slice and is
added up in order by a second kernel: the same bits every time.

Sizes are no part of a compiled kernel, so that one serves every shape. The inner loops load nothing
but operands: what else they loaded, the compiler would send through shared memory as well.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import dot, store_partial, sum_of_slices
from .epilogue import store_tile
from .records import (
    BRANCH,
    REGION,
    RUN,
    UNIT,
    branch_input,
    multiple,
    next_tap,
    pick,
    pixels_of,
    region_branch,
    region_runs,
    run_blocks,
    run_steps,
    run_taps,
    unit_slice,
    unit_sum,
    unit_tile,
    weight_rows,
)

SIZES = ["height", "width", "a_chunks", "b_chunks", "out_chunks", "shift_pitch"]
SWITCHES = ["has_scale", "has_shift", "relu"]
UNALIGNED = ["scale", "shift"]


@triton.jit(do_not_specialize=SIZES + SWITCHES, do_not_specialize_on_alignment=UNALIGNED)
def gather_kernel(
    units,
    regions,
    runs,
    branches,
    a,  # forward: x [P, a_chunks]; grad_input: grad [P, a_chunks]
    weights,  # per branch [O, taps, b_chunks]
    out,  # [P, out_chunks]
    scale,  # see store_tile
    shift,
    partials,  # [slices, M, N] float32
    means,
    squares,
    height,
    width,
    a_chunks,
    b_chunks,
    out_chunks,
    shift_pitch,
    has_scale,
    has_shift,
    relu,
    GRAD_INPUT: tl.constexpr,
    STATISTICS: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    BRANCHES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,  # elements of 16 bytes
    PRECISION: tl.constexpr,
):
    """Forward ``out = cat_b conv(x, w_b)`` and, with mirrored taps, the gradient of the input
    ``out = sum_b conv_transposed(grad_b, w_b)``: M pixels x N channels at a time."""
    unit = units + tl.program_id(0) * UNIT
    r, m_begin, m_count, n_begin = unit_tile(unit)
    k_begin, k_end = unit_sum(unit)
    region = regions + r * REGION
    depth = tl.arange(0, K)
    rows = tl.arange(0, M)
    valid = rows < m_count
    rows = m_begin + tl.where(valid, rows, 0)
    pixel, image, y, x = pixels_of(region, rows, height, width)
    columns = multiple(n_begin, N) + tl.arange(0, N)
    own = branches + region_branch(region) * BRANCH
    pitch = b_chunks * CHUNK

    sums = tl.zeros((M, N), tl.float32)
    run_begin, run_end = region_runs(region)
    for s in range(run_begin, run_end):
        run = runs + s * RUN
        branch, index, dy, dx, tap_columns = run_taps(run)
        index_step, dy_step, dx_step = run_steps(run)
        run_first, blocks, count = run_blocks(run)
        a_first, a_extent, taps = branch_input(branches + branch * BRANCH)
        w = pick(weights, branch, BRANCHES)
        if GRAD_INPUT:  # K runs over output channels, N over input channels
            b_at = (depth * (taps * pitch))[:, None] + columns[None, :]
            b_inside = columns < pitch
            b_extent = weight_rows(branches + branch * BRANCH)
            b_step = taps * pitch
        else:
            b_at = depth[:, None] + (columns * (taps * pitch))[None, :]
            b_inside = columns < weight_rows(own)
            b_extent = pitch
            b_step = 1
        begin = tl.maximum(k_begin, run_first)
        tap = (begin - run_first) // blocks
        block = begin - run_first - tap * blocks
        i = tap // tap_columns
        j = tap - i * tap_columns
        for _step in range(begin, tl.minimum(k_end, run_first + count * blocks)):
            k = block * K
            tap_dy, tap_dx = dy + i * dy_step, dx + j * dx_step
            yy, xx = y + tap_dy, x + tap_dx
            live = valid & (yy >= 0) & (yy < height) & (xx >= 0) & (xx < width)
            at = (pixel + (tap_dy * width + tap_dx)).to(tl.int64) * (a_chunks * CHUNK)
            left = tl.load(
                a + (a_first * CHUNK + k) + at[:, None] + depth[None, :],
                mask=live[:, None] & (k + depth < a_extent * CHUNK)[None, :],
                other=0.0,
            )
            right = tl.load(
                w + ((index + i * index_step + j) * pitch + k * b_step) + b_at,
                mask=(k + depth < b_extent)[:, None] & b_inside[None, :],
                other=0.0,
            )
            sums = dot(left, right, sums, PRECISION)
            block += 1
            is_last = block == blocks
            block = tl.where(is_last, 0, block)
            i, j = next_tap(is_last, i, j, tap_columns)

    piece, slices, slot, tile = unit_slice(unit)
    if slices > 1:
        store_partial(sums, partials, slot + piece, M, N)
    else:
        # Once more: kept throughout the sum, these would take its registers.
        pixel, image, y, x = pixels_of(region, rows, height, width)
        store_tile(
            sums, pixel, image, valid, m_count, n_begin, own, tile, out, out_chunks, scale,
            shift, shift_pitch, has_scale, has_shift, relu, means, squares, STATISTICS,
            PER_SAMPLE, M, N, CHUNK,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES + SWITCHES, do_not_specialize_on_alignment=UNALIGNED)
def finish_gather_kernel(
    units,
    cut,  # the first units of the tiles that are cut into slices
    regions,
    branches,
    out,
    scale,
    shift,
    partials,
    means,
    squares,
    height,
    width,
    out_chunks,
    shift_pitch,
    has_scale,
    has_shift,
    relu,
    STATISTICS: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    W: tl.constexpr,  # columns of a program
    CHUNK: tl.constexpr,
):
    """Adds up the slices of a tile of :func:`gather_kernel` and finishes it."""
    unit = units + tl.load(cut + tl.program_id(0)) * UNIT
    r, m_begin, m_count, n_begin = unit_tile(unit)
    piece, slices, slot, tile = unit_slice(unit)
    region = regions + r * REGION
    rows = tl.arange(0, M)
    valid = rows < m_count
    pixel, image, y, x = pixels_of(region, m_begin + tl.where(valid, rows, 0), height, width)
    own = branches + region_branch(region) * BRANCH
    part = tl.program_id(1) * W
    sums = sum_of_slices(partials, slot, slices, part, M, N, W)
    store_tile(
        sums, pixel, image, valid, m_count, n_begin + part, own, tile * (N // W) + part // W, out,
        out_chunks, scale, shift, shift_pitch, has_scale, has_shift, relu, means, squares,
        STATISTICS, PER_SAMPLE, M, W, CHUNK,
    )  # fmt: skip
