# SPDX-License-Identifier: BSD-3-Clause
"""The depthwise part of the separable pyramid alone, which its gradients need: forward, gradients
of input, weight and what is between. Nothing here is a matrix product; memory is the limit.

A program computes M pixels of a planner's work list x N channels. What pixels sum up to is written
per tile of pixels and added up in order by another kernel: the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import rounded, store_partial, sum_of_slices
from .records import (
    BRANCH,
    REGION,
    RUN,
    UNIT,
    branch_input,
    multiple,
    pick,
    pixels_of,
    region_runs,
    run_blocks,
    run_steps,
    run_taps,
    unit_slice,
    unit_sum,
    unit_tile,
)
from .taps import add_taps, between, region_padded, sum_taps, widened, words

SIZES = ["height", "width", "x_chunks", "grad_chunks", "chunks", "blocks"]


@triton.jit(do_not_specialize=["channels", "blocks"], do_not_specialize_on_alignment=["given"])
def pack_kernel(
    branches,  # the first row in packed, whether something is between, the taps or 0 for none
    given,  # depthwise weights [C, taps] of all branches, scales [C] and shifts [C] between
    packed,  # [taps of all branches, blocks * W] float32
    affine,  # per branch scale and shift [2, blocks * W] float32
    channels,
    blocks,
    BRANCHES: tl.constexpr,
    T: tl.constexpr,  # taps at a time
    W: tl.constexpr,  # channels of a program
):
    """Weights as the kernels read them: taps in rows, zero beyond the channels; a branch without
    depthwise weights gets a tap of one."""
    b = tl.program_id(0)
    row, has_between, taps = branch_input(branches + b * BRANCH)
    lanes = tl.program_id(1) * W + tl.arange(0, W)
    inside = lanes < channels
    pitch = blocks * W
    source = pick(given, b, BRANCHES)
    target = packed + row.to(tl.int64) * pitch
    for first in range(0, tl.maximum(taps, 1), T):
        tap = first + tl.arange(0, T)
        wanted = inside[:, None] & (tap < taps)[None, :]
        weight = tl.load(source + lanes[:, None] * taps + tap[None, :], mask=wanted, other=0.0)
        weight = tl.where((taps == 0) & inside[:, None], 1.0, weight.to(tl.float32))
        exists = (tap < tl.maximum(taps, 1))[None, :] & (lanes < pitch)[:, None]
        tl.store(target + tap[None, :] * pitch + lanes[:, None], weight, mask=exists)
    known = lanes < tl.where(has_between != 0, channels, 0)
    for i in tl.static_range(2):
        value = tl.load(pick(given, (i + 1) * BRANCHES + b, 3 * BRANCHES) + lanes, mask=known)
        value = tl.where(known, value.to(tl.float32), tl.where(inside, 1.0 - i, 0.0))
        tl.store(affine + (b * 2 + i).to(tl.int64) * pitch + lanes, value)


@triton.jit
def tile_of_pixels(unit, regions, height, width, M: tl.constexpr):
    """Of a unit: its region, first column, pixels (index, y, x), those that are valid, and whether
    its taps need masks."""
    r, m_begin, m_count, n_begin = unit_tile(unit)
    region = regions + r * REGION
    of_tile = tl.arange(0, M)
    valid = of_tile < m_count
    of_region = m_begin + tl.where(valid, of_tile, 0)
    pixel, image, y, x = pixels_of(region, of_region, height, width)
    return region, n_begin, pixel, y, x, valid


@triton.jit(do_not_specialize=[*SIZES, "relu"])
def depthwise_kernel(
    units,
    regions,
    runs,
    x,  # [P, x_chunks]
    grad,  # GRADIENT: of e, [P, grad_chunks]
    e,  # FORWARD: relu(depthwise(x) * scale + shift), [P, chunks]
    grad_sums,  # GRADIENT: of depthwise(x), [P, grad_chunks]; may be grad itself
    depthwise,  # [taps, blocks * N] float32
    affine,  # [2, blocks * N] float32
    of_between,  # GRADIENT: per tile of pixels, of scale and shift [2, blocks * N] float32
    height,
    width,
    x_chunks,
    grad_chunks,
    chunks,
    blocks,
    relu,
    FORWARD: tl.constexpr,
    GRADIENT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    TAPS: tl.constexpr,
    CHUNK: tl.constexpr,  # elements of 16 bytes
):
    """A branch's depthwise convolution and what is between, forward and, once more, backward."""
    unit = units + tl.program_id(0) * UNIT
    region, _n, pixel, y, xx, valid = tile_of_pixels(unit, regions, height, width, M)
    run_begin, run_end = region_runs(region)
    n_begin = tl.program_id(1) * N
    columns = n_begin + tl.arange(0, N)
    weight_pitch = blocks * N
    WORD: tl.constexpr = 2 if x.dtype.element_ty == tl.bfloat16 else 1  # channels of a word
    pitch = x_chunks * (CHUNK // WORD)
    at = pixel.to(tl.int64) * pitch
    source = words(x) + n_begin // WORD
    inside = n_begin // WORD + tl.arange(0, N // WORD) < chunks * (CHUNK // WORD)
    if region_padded(region) | (n_begin + N > chunks * CHUNK):
        sums = sum_taps(
            source, at, inside, y, xx, depthwise + n_begin, runs, run_begin, run_end, height, width,
            pitch, weight_pitch, M, N, TAPS, True,
        )  # fmt: skip
    else:
        sums = sum_taps(
            source, at, inside, y, xx, depthwise + n_begin, runs, run_begin, run_end, height, width,
            pitch, weight_pitch, M, N, TAPS, False,
        )  # fmt: skip
    scale, shift = tl.load(affine + columns), tl.load(affine + weight_pitch + columns)
    written = valid[:, None] & (columns < chunks * CHUNK)[None, :]
    if FORWARD:
        place = pixel.to(tl.int64)[:, None] * (chunks * CHUNK) + columns[None, :]
        y = rounded(between(sums, scale, shift, relu), e.dtype.element_ty)
        tl.store(e + place, y, mask=written)
    if GRADIENT:
        place = pixel.to(tl.int64)[:, None] * (grad_chunks * CHUNK) + columns[None, :]
        g = tl.load(grad + place, mask=written, other=0.0).to(tl.float32)
        z = sums * scale[None, :] + shift[None, :]
        g = tl.where(relu != 0, tl.where(z <= 0, 0.0, g), g)
        of_sums = rounded(g * scale[None, :], grad_sums.dtype.element_ty)
        tl.store(grad_sums + place, of_sums, mask=written)
        piece, slices, slot, tile = unit_slice(unit)
        to = of_between + tile.to(tl.int64) * 2 * weight_pitch + columns
        tl.store(to, tl.sum(tl.where(written, g * sums, 0.0), 0))
        tl.store(to + weight_pitch, tl.sum(g, 0))


@triton.jit(do_not_specialize=[*SIZES, "first_tap", "taps"])
def grad_depthwise_kernel(
    units,
    regions,
    runs,
    grad,  # of depthwise(x), [P, grad_chunks]
    x,  # [P, x_chunks]
    sums,  # per tile of pixels [taps, blocks * N] float32; zero where it has no such tap
    height,
    width,
    x_chunks,
    grad_chunks,
    chunks,
    blocks,
    first_tap,  # sums has those from here on
    taps,
    M: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """``sum_p grad[p, c] x[p + tap, c]`` of a tile of pixels, for each tap that is live there."""
    unit = units + tl.program_id(0) * UNIT
    region, _n, pixel, y, xx, valid = tile_of_pixels(unit, regions, height, width, M)
    run_begin, run_end = region_runs(region)
    n_begin = tl.program_id(1) * N
    WORD: tl.constexpr = 2 if x.dtype.element_ty == tl.bfloat16 else 1  # channels of a word
    of_row = n_begin // WORD + tl.arange(0, N // WORD)
    inside = of_row < chunks * (CHUNK // WORD)
    place = pixel.to(tl.int64)[:, None] * (grad_chunks * (CHUNK // WORD)) + of_row[None, :]
    mask = valid[:, None] & inside[None, :]
    g = widened(tl.load(words(grad) + place, mask=mask, other=0), M, N)
    pitch = x_chunks * (CHUNK // WORD)
    place = pixel.to(tl.int64)[:, None] * pitch + of_row[None, :]
    piece, slices, slot, tile = unit_slice(unit)
    to = sums + tile.to(tl.int64) * taps * (blocks * N) + n_begin + tl.arange(0, N)
    for s in range(run_begin, run_end):
        run = runs + s * RUN
        branch, index, dy, dx, tap_columns = run_taps(run)
        index_step, dy_step, dx_step = run_steps(run)
        first_block, depth, count = run_blocks(run)
        for t in range(count):
            i = t // tap_columns
            j = t - i * tap_columns
            tap = index + i * index_step + j - first_tap
            if (tap >= 0) & (tap < taps):
                tap_dy, tap_dx = dy + i * dy_step, dx + j * dx_step
                live = ((y + tap_dy).to(tl.uint32) < height.to(tl.uint32)) & (
                    (xx + tap_dx).to(tl.uint32) < width.to(tl.uint32)
                )
                move = (tap_dy * width + tap_dx).to(tl.int64) * pitch
                loaded = tl.load(
                    words(x) + move + place, mask=live[:, None] & inside[None, :], other=0
                )
                tl.store(to + tap * (blocks * N), tl.sum(widened(loaded, M, N) * g, 0))


@triton.jit(
    do_not_specialize=["tiles", "step", "rows", "blocks", "channels", "channel_step", "row_step"]
)
def add_tiles_kernel(
    sums,  # [tiles, rows, blocks * N] float32, tiles ``step`` blocks apart
    out,
    tiles,
    step,
    rows,
    blocks,
    channels,
    channel_step,  # in out
    row_step,
    N: tl.constexpr,
    T: tl.constexpr,  # tiles at a time
    W: tl.constexpr,  # sums of a program
):
    """``out[channel * channel_step + row * row_step]``: the tiles' sums, added up in order."""
    place = tl.program_id(0) * W + tl.arange(0, W)
    row = place // (blocks * N)
    channel = place - row * (blocks * N)
    known = (row < rows) & (channel < channels)
    total = tl.zeros((W,), tl.float64)
    for first in range(0, tiles, T):
        tile = first + tl.arange(0, T)
        at = sums + tile.to(tl.int64)[:, None] * (step * N) + place[None, :]
        value = tl.load(at, mask=(tile < tiles)[:, None] & known[None, :], other=0.0)
        total += tl.sum(value.to(tl.float64), 0)
    value = rounded(total.to(tl.float32), out.dtype.element_ty)
    tl.store(out + row * row_step + channel * channel_step, value, mask=known)


@triton.jit(do_not_specialize=SIZES)
def grad_input_kernel(
    units,
    regions,
    runs,
    branches,
    grads,  # per branch that of depthwise(x), [P, chunks]
    depthwise,  # [taps of all branches, blocks * N] float32
    out,  # [P, chunks]
    partials,  # [slices, M, N] float32
    height,
    width,
    chunks,
    blocks,
    BRANCHES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    TAPS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The gradient of x: all branches' taps, mirrored, rounded once. Each branch has a sum of its
    own, for one long sum of all taps would round worse than PyTorch's sums of sums."""
    unit = units + tl.program_id(0) * UNIT
    region, n_begin, pixel, y, xx, valid = tile_of_pixels(unit, regions, height, width, M)
    k_begin, k_end = unit_sum(unit)
    run_begin, run_end = region_runs(region)
    n_begin = multiple(n_begin, N)
    WORD: tl.constexpr = 2 if out.dtype.element_ty == tl.bfloat16 else 1  # channels of a word
    pitch = chunks * (CHUNK // WORD)
    at = pixel.to(tl.int64) * pitch
    inside = n_begin // WORD + tl.arange(0, N // WORD) < pitch
    masked = region_padded(region) | (n_begin + N > chunks * CHUNK)
    sums = tl.zeros((M, N), tl.float32)
    for s in range(run_begin, run_end):
        run = runs + s * RUN
        branch, index, dy, dx, tap_columns = run_taps(run)
        run_first, depth, count = run_blocks(run)
        begin = tl.maximum(k_begin, run_first)
        skip = begin - run_first
        taken = tl.minimum(k_end, run_first + count) - begin
        row, has_between, taps = branch_input(branches + branch * BRANCH)
        source = words(pick(grads, branch, BRANCHES)) + n_begin // WORD
        weights = depthwise + row.to(tl.int64) * (blocks * N) + n_begin
        of_branch = tl.zeros((M, N), tl.float32)
        if masked:
            of_branch = add_taps(
                of_branch, source, at, inside, y, xx, weights, run, skip, taken, height, width,
                pitch, blocks * N, M, N, TAPS, True,
            )  # fmt: skip
        else:
            of_branch = add_taps(
                of_branch, source, at, inside, y, xx, weights, run, skip, taken, height, width,
                pitch, blocks * N, M, N, TAPS, False,
            )  # fmt: skip
        sums += of_branch
    piece, slices, slot, tile = unit_slice(unit)
    if slices > 1:
        store_partial(sums, partials, slot + piece, M, N)
    else:
        store_pixels(sums, out, pixel, valid, n_begin, chunks * CHUNK, N)


@triton.jit
def store_pixels(sums, out, pixel, valid, n_begin, pitch, N: tl.constexpr):
    """Rounds a tile ``[M, N]`` and writes it to rows of ``pitch`` channels."""
    columns = n_begin + tl.arange(0, N)
    place = pixel.to(tl.int64)[:, None] * pitch + columns[None, :]
    mask = valid[:, None] & (columns < pitch)[None, :]
    tl.store(out + place, rounded(sums, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["height", "width", "chunks"])
def finish_grad_input_kernel(
    units,
    cut,  # the first units of the tiles that are cut into slices
    regions,
    out,
    partials,
    height,
    width,
    chunks,
    M: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Adds up the slices of a tile of :func:`grad_input_kernel`."""
    unit = units + tl.load(cut + tl.program_id(0)) * UNIT
    region, n_begin, pixel, y, xx, valid = tile_of_pixels(unit, regions, height, width, M)
    piece, slices, slot, tile = unit_slice(unit)
    sums = sum_of_slices(partials, slot, slices, 0, M, N, N)
    store_pixels(sums, out, pixel, valid, n_begin, chunks * CHUNK, N)
