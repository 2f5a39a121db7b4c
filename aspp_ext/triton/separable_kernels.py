# SPDX-License-Identifier: BSD-3-Clause
"""The depthwise-separable pyramid, forward: all branches in one launch, nothing in between stored.

A program computes one unit of a planner's work list, M pixels x N output channels of one branch, K
input channels at a time: their depthwise sums on the ordinary cores, then their part of the 1x1 on
the tensor cores. The tile of the 1x1's weight is read one block ahead, which hides its latency
behind the taps; x is read tap by tap through the first-level cache, which finds again what
neighbouring taps share. The widest tiles leave registers for two programs on a multiprocessor:
one computes taps while the other's product is under way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import dot, rounded, store_partial
from .epilogue import store_tile
from .records import (
    BRANCH,
    REGION,
    RUN,
    UNIT,
    branch_input,
    multiple,
    pick,
    pixels_of,
    region_branch,
    region_runs,
    run_blocks,
    unit_slice,
    unit_sum,
    unit_tile,
    weight_rows,
)
from .taps import BLOCK, add_taps, between, region_padded, sum_taps, words

SIZES = ["height", "width", "x_chunks", "weight_chunks", "blocks", "out_chunks", "shift_pitch"]
SWITCHES = ["between_relu", "has_scale", "has_shift", "relu"]
UNALIGNED = ["scale", "shift"]


@triton.jit
def load_weight(weight, k, columns, rows, pitch, K: tl.constexpr):
    """``[K, N]`` of a 1x1's weight ``[rows, pitch]`` from column k on, zero outside."""
    depth = k + tl.arange(0, K)
    at = depth[:, None] + (columns * pitch)[None, :]
    return tl.load(
        weight + at, mask=(depth < pitch)[:, None] & (columns < rows)[None, :], other=0.0
    )


@triton.jit
def finish_operand(sums, affine, k, pitch, relu, K: tl.constexpr, DTYPE: tl.constexpr):
    """What is between the convolutions, and the rounding of the product's operand."""
    lanes = k + tl.arange(0, K)
    scale, shift = tl.load(affine + lanes), tl.load(affine + pitch + lanes)
    return rounded(between(sums, scale, shift, relu), DTYPE)


@triton.jit(do_not_specialize=SIZES + SWITCHES, do_not_specialize_on_alignment=UNALIGNED)
def separable_kernel(
    units,
    regions,
    runs,
    branches,
    x,  # [P, x_chunks], of which weight_chunks are its own
    pointwise,  # per branch [O, weight_chunks]
    depthwise,  # [taps of all branches, pitch] float32, zero beyond C; see pack_kernel
    affine,  # per branch scale and shift [2, pitch] float32
    out,  # [P, out_chunks]
    scale,  # see store_tile
    shift,
    partials,  # [slices, M, N] float32
    height,
    width,
    x_chunks,
    weight_chunks,
    blocks,
    out_chunks,
    shift_pitch,
    between_relu,
    has_scale,
    has_shift,
    relu,
    PER_SAMPLE: tl.constexpr,
    BRANCHES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    CHUNK: tl.constexpr,  # elements of 16 bytes
    PRECISION: tl.constexpr,
):
    unit = units + tl.program_id(0) * UNIT
    r, m_begin, m_count, n_begin = unit_tile(unit)
    k_begin, k_end = unit_sum(unit)
    region = regions + r * REGION
    b = region_branch(region)
    own = branches + b * BRANCH
    row, has_between, taps = branch_input(own)
    between_relu *= has_between
    columns = multiple(n_begin, N) + tl.arange(0, N)
    weight, rows = pick(pointwise, b, BRANCHES), weight_rows(own)
    weight_pitch = weight_chunks * CHUNK
    pitch = blocks * BLOCK
    depthwise += row.to(tl.int64) * pitch
    affine += b.to(tl.int64) * 2 * pitch

    WORD: tl.constexpr = 2 if x.dtype.element_ty == tl.bfloat16 else 1  # channels of a word
    source = words(x)
    x_pitch = x_chunks * (CHUNK // WORD)
    of_tile = tl.arange(0, M)
    valid = of_tile < m_count
    of_region = m_begin + tl.where(valid, of_tile, 0)
    pixel, image, y, xx = pixels_of(region, of_region, height, width)
    at = pixel.to(tl.int64) * x_pitch
    of_block = tl.arange(0, K // WORD)

    # Whole blocks of regions where no tap reads outside need no masks.
    run_begin, run_end = region_runs(region)
    run = runs + run_begin * RUN
    first_block, depth, count = run_blocks(run)
    whole = tl.minimum(k_end, weight_pitch // K)
    whole = tl.where(region_padded(region) | (run_end > run_begin + 1), k_begin, whole)
    whole = tl.maximum(k_begin, whole)

    product = tl.zeros((M, N), tl.float32)
    right = load_weight(weight, k_begin * K, columns, rows, weight_pitch, K)
    for block in range(k_begin, whole):
        k = block * K
        sums = add_taps(
            tl.zeros((M, K), tl.float32), source + k // WORD, at, of_block, y, xx, depthwise + k,
            run, 0, count, height, width, x_pitch, pitch, M, K, TAPS, False,
        )  # fmt: skip
        left = finish_operand(sums, affine, k, pitch, between_relu, K, x.dtype.element_ty)
        product = dot(left, right, product, PRECISION)
        right = load_weight(weight, k + K, columns, rows, weight_pitch, K)
    for block in range(whole, k_end):
        k = block * K
        inside = of_block < (weight_pitch - k) // WORD
        sums = sum_taps(
            source + k // WORD, at, inside, y, xx, depthwise + k, runs, run_begin, run_end, height,
            width, x_pitch, pitch, M, K, TAPS, True,
        )  # fmt: skip
        left = finish_operand(sums, affine, k, pitch, between_relu, K, x.dtype.element_ty)
        product = dot(left, right, product, PRECISION)
        right = load_weight(weight, k + K, columns, rows, weight_pitch, K)

    piece, slices, slot, tile = unit_slice(unit)
    if slices > 1:
        store_partial(product, partials, slot + piece, M, N)
    else:
        # Once more: kept throughout the sum, these would take its registers.
        pixel, image, y, xx = pixels_of(region, of_region, height, width)
        store_tile(
            product, pixel, image, valid, m_count, n_begin, own, tile, out, out_chunks, scale,
            shift, shift_pitch, has_scale, has_shift, relu, partials, partials, False, PER_SAMPLE,
            M, N, CHUNK,
        )  # fmt: skip
