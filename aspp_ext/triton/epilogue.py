# SPDX-License-Identifier: BSD-3-Clause
"""What happens to a finished tile of sums: scale, shift, ReLU, statistics, the store."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import rounded
from .records import branch_output, branch_vector, multiple, weight_rows


@triton.jit
def affine_relu(sums, scale, shift, relu):
    """``relu(sums * scale + shift)``; a NaN stays one."""
    y = sums * scale + shift
    return tl.where((y < 0) & (relu != 0), 0.0, y)


@triton.jit
def store_columns(
    sums,  # [M, N]
    pixel,  # [M]: index in the batch
    image,  # [M]
    valid,  # [M]
    columns,  # [N]: of the branch
    first,  # the branch's first channel in out
    extent,  # its channels there
    channels,  # those that scale and shift have
    vector,  # the branch's first entry in these
    out,
    out_pitch,
    scale,
    shift,
    shift_pitch,
    has_scale,
    has_shift,
    relu,
    PER_SAMPLE: tl.constexpr,
):
    """Writes a part of a tile; returns what it wrote, rounded, in float32."""
    at = vector + columns
    scaled = columns < tl.where(has_scale != 0, channels, 0)
    factor = tl.load(scale + at, mask=scaled, other=1.0).to(tl.float32)
    shifted = columns < tl.where(has_shift != 0, channels, 0)
    if PER_SAMPLE:
        own = shift + image.to(tl.int64)[:, None] * shift_pitch + at[None, :]
        offset = tl.load(own, mask=valid[:, None] & shifted[None, :], other=0.0).to(tl.float32)
    else:
        offset = tl.load(shift + at, mask=shifted, other=0.0).to(tl.float32)
        offset = offset[None, :]
    y = rounded(affine_relu(sums, factor[None, :], offset, relu), out.dtype.element_ty)
    place = pixel.to(tl.int64)[:, None] * out_pitch + (first + columns)[None, :]
    tl.store(out + place, y, mask=valid[:, None] & (columns < extent)[None, :])
    return y.to(tl.float32)


@triton.jit
def store_statistics(y, valid, count, means, squares, at, inside):
    """Per column, the mean of the valid rows and the sum of squared differences from it."""
    mean = tl.sum(tl.where(valid[:, None], y, 0.0), 0) / count
    difference = tl.where(valid[:, None], y - mean[None, :], 0.0)
    tl.store(means + at, mean, mask=inside)
    tl.store(squares + at, tl.sum(difference * difference, 0), mask=inside)


@triton.jit
def store_tile(
    sums,  # [M, N] float32
    pixel,  # [M] int32: index in the batch
    image,  # [M] int32
    valid,  # [M]: rows beyond the end of the region are not
    count,  # of those that are
    n_begin,  # the first column of the tile
    branch,  # the record of the branch whose output this is
    tile,
    out,  # [P, out_chunks]
    out_chunks,
    scale,  # [channels]
    shift,  # [channels], or PER_SAMPLE [N, channels] with shift_pitch from one sample to the next
    shift_pitch,
    has_scale,
    has_shift,
    relu,
    means,  # [tiles, N], of what is written
    squares,  # [tiles, N]: sums of squared differences from the mean
    STATISTICS: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,  # elements of 16 bytes
):
    """Writes a tile of the output and its statistics, in parts that do not spill registers."""
    PARTS: tl.constexpr = 2 if N > 64 else 1
    WIDTH: tl.constexpr = N // PARTS
    if PARTS == 2:
        left, right = tl.split(tl.permute(tl.reshape(sums, (M, 2, WIDTH)), (0, 2, 1)))
    else:
        left, right = sums, sums
    first, extent = branch_output(branch)
    vector, channels = branch_vector(branch), weight_rows(branch)
    for part in tl.static_range(PARTS):
        of_tile = part * WIDTH + tl.arange(0, WIDTH)
        columns = multiple(n_begin, N) + of_tile
        written = store_columns(
            left if part == 0 else right, pixel, image, valid, columns, first * CHUNK,
            extent * CHUNK, channels, vector, out, out_chunks * CHUNK, scale, shift,
            shift_pitch, has_scale, has_shift, relu, PER_SAMPLE,
        )  # fmt: skip
        if STATISTICS:
            at = tile.to(tl.int64) * N + of_tile
            store_statistics(written, valid, count, means, squares, at, columns < channels)
