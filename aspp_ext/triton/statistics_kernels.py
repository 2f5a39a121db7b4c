# SPDX-License-Identifier: BSD-3-Clause
"""Statistics of tiles become those of the channels, always in the same order."""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = tl.constexpr(6)  # fields of a group of channels: see work.channel_groups


@triton.jit
def combine_kernel(
    groups,
    tile_rows,  # [tiles]
    means,  # [tiles, N]
    squares,  # [tiles, N]: sums of squared differences from the mean
    mean,  # [channels]
    square,  # [channels]
    N: tl.constexpr,
    W: tl.constexpr,  # channels of a program
    T: tl.constexpr,  # tiles at a time
):
    """Of all rows: the mean is that of the tiles weighted by their rows, and what the tiles'
    means differ from it joins the squares (Chan, Golub and LeVeque, 1979)."""
    group = groups + tl.program_id(0) * GROUP
    first_tile, tile_count, stride = tl.load(group), tl.load(group + 1), tl.load(group + 2)
    column, width, out = tl.load(group + 3), tl.load(group + 4), tl.load(group + 5)
    of_group = tl.arange(0, W)
    inside = of_group < width

    total = tl.full((), 0.0, tl.float64)
    weighted = tl.zeros((W,), tl.float64)
    for t in range(0, tile_count, T):
        i = t + tl.arange(0, T)
        tile = first_tile + i * stride
        rows = tl.load(tile_rows + tile, mask=i < tile_count, other=0).to(tl.float64)
        at = tile.to(tl.int64)[:, None] * N + (column + of_group)[None, :]
        given = (i < tile_count)[:, None] & inside[None, :]
        value = tl.load(means + at, mask=given, other=0.0).to(tl.float64)
        weighted += tl.sum(value * rows[:, None], 0)
        total += tl.sum(rows, 0)
    overall = weighted / total

    spread = tl.zeros((W,), tl.float64)
    for t in range(0, tile_count, T):
        i = t + tl.arange(0, T)
        tile = first_tile + i * stride
        rows = tl.load(tile_rows + tile, mask=i < tile_count, other=0).to(tl.float64)
        at = tile.to(tl.int64)[:, None] * N + (column + of_group)[None, :]
        given = (i < tile_count)[:, None] & inside[None, :]
        value = tl.load(means + at, mask=given, other=0.0).to(tl.float64)
        difference = tl.where(given, value - overall[None, :], 0.0)
        within = tl.load(squares + at, mask=given, other=0.0).to(tl.float64)
        spread += tl.sum(within + difference * difference * rows[:, None], 0)
    tl.store(mean + out + of_group, overall.to(tl.float32), mask=inside)
    tl.store(square + out + of_group, spread.to(tl.float32), mask=inside)
