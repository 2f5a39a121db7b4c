# SPDX-License-Identifier: BSD-3-Clause
"""The gradient of the dense pyramid's weights: a GEMM over the pixels where a tap is live.

``grad_w[o, tap, c] = sum_p grad[p, o] x[p + tap, c]``. A program computes one unit of
a planner's work list, here M output channels x N input channels of one tap; slices of a sum are
added up in order, as in :mod:`pyramid_kernels`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import dot, rounded, store_partial, sum_of_slices
from .records import (
    BRANCH,
    REGION,
    RUN,
    UNIT,
    branch_input,
    multiple,
    pick,
    region_box,
    region_runs,
    run_taps,
    unit_slice,
    unit_sum,
    unit_tile,
    weight_rows,
)


@triton.jit
def store_gradient(
    sums,  # [M, N]
    unit,
    part,  # the first column, from the unit's own
    regions,
    runs,
    branches,
    outs,
    channels,
    BRANCHES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Writes a tile of one tap of the gradient ``[O, taps, channels]``."""
    r, m_begin, m_count, n_begin = unit_tile(unit)
    run_begin, run_end = region_runs(regions + r * REGION)
    branch, index, dy, dx, tap_columns = run_taps(runs + run_begin * RUN)
    a_first, a_extent, taps = branch_input(branches + branch * BRANCH)
    rows = m_begin + tl.arange(0, M)
    columns = multiple(n_begin, N) + part + tl.arange(0, N)
    out = pick(outs, branch, BRANCHES)
    at = (rows.to(tl.int64) * taps + index)[:, None] * channels + columns[None, :]
    inside = (rows < weight_rows(branches + branch * BRANCH))[:, None] & (columns < channels)[None]
    tl.store(out + at, rounded(sums, out.dtype.element_ty), mask=inside)


SIZES = ["batch", "height", "width", "a_chunks", "b_chunks", "channel_chunks"]


@triton.jit(do_not_specialize=SIZES)
def grad_weight_kernel(
    units,
    regions,
    runs,
    branches,
    grad,  # [P, a_chunks]
    x,  # [P, b_chunks], of which channel_chunks are its own
    outs,  # per branch [O, taps, channel_chunks]
    partials,  # [slices, M, N] float32
    batch,
    height,
    width,
    a_chunks,
    b_chunks,
    channel_chunks,
    BRANCHES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    unit = units + tl.program_id(0) * UNIT
    r, m_begin, m_count, n_begin = unit_tile(unit)
    k_begin, k_end = unit_sum(unit)
    region = regions + r * REGION
    run_begin, run_end = region_runs(region)
    branch, index, dy, dx, tap_columns = run_taps(runs + run_begin * RUN)
    a_first, a_extent, taps = branch_input(branches + branch * BRANCH)
    a_columns = multiple(m_begin, M) + tl.arange(0, M)
    b_columns = multiple(n_begin, N) + tl.arange(0, N)
    a_inside = a_columns < a_extent * CHUNK
    b_inside = b_columns < channel_chunks * CHUNK
    a_columns += a_first * CHUNK

    # The pixels of a block, and how far the next one's are from them: no division per block.
    y0, x0, lines, columns = region_box(region)
    columns = tl.maximum(columns, 1)  # of a tap that is dead everywhere
    lines = tl.maximum(lines, 1)
    start = k_begin * K + tl.arange(0, K)
    line = start // columns
    column = start - line * columns
    image = line // lines
    line -= image * lines
    line_step = K // columns
    column_step = K - line_step * columns
    image_step = line_step // lines
    line_step -= image_step * lines

    sums = tl.zeros((M, N), tl.float32)
    for _step in range(k_begin, k_end):
        pixel = (image * height + y0 + line) * width + x0 + column
        valid = image < batch
        at = pixel.to(tl.int64) * (a_chunks * CHUNK)
        left = tl.load(
            grad + a_columns[:, None] + at[None, :],
            mask=a_inside[:, None] & valid[None, :],
            other=0.0,
        )
        at = (pixel + (dy * width + dx)).to(tl.int64) * (b_chunks * CHUNK)
        right = tl.load(
            x + at[:, None] + b_columns[None, :],
            mask=valid[:, None] & b_inside[None, :],
            other=0.0,
        )
        sums = dot(left, right, sums, PRECISION)
        column += column_step
        wraps = column >= columns
        column = tl.where(wraps, column - columns, column)
        line += tl.where(wraps, line_step + 1, line_step)
        wraps = line >= lines
        line = tl.where(wraps, line - lines, line)
        image += tl.where(wraps, image_step + 1, image_step)

    piece, slices, slot, tile = unit_slice(unit)
    if slices > 1:
        store_partial(sums, partials, slot + piece, M, N)
    else:
        store_gradient(
            sums, unit, 0, regions, runs, branches, outs, channel_chunks * CHUNK, BRANCHES, M, N
        )


@triton.jit(do_not_specialize=["channel_chunks"])
def finish_grad_weight_kernel(
    units,
    cut,  # the first units of the tiles that are cut into slices
    regions,
    runs,
    branches,
    outs,
    partials,
    channel_chunks,
    BRANCHES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    W: tl.constexpr,  # columns of a program
    CHUNK: tl.constexpr,
):
    """Adds up the slices of a tile of :func:`grad_weight_kernel`."""
    unit = units + tl.load(cut + tl.program_id(0)) * UNIT
    piece, slices, slot, tile = unit_slice(unit)
    part = tl.program_id(1) * W
    sums = sum_of_slices(partials, slot, slices, part, M, N, W)
    store_gradient(
        sums, unit, part, regions, runs, branches, outs, channel_chunks * CHUNK, BRANCHES, M, W
    )
