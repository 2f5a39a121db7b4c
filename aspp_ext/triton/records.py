# SPDX-License-Identifier: BSD-3-Clause
"""Work lists as the kernels read them: the records of csrc/plan/work_list.h, in int32."""

from __future__ import annotations

import triton
import triton.language as tl

# Fields per record.
UNIT = tl.constexpr(14)
REGION = tl.constexpr(10)
RUN = tl.constexpr(11)
BRANCH = tl.constexpr(7)


@triton.jit
def unit_tile(unit):
    """Of a unit: its region, the first row and how many there are, the first column."""
    return tl.load(unit), tl.load(unit + 1), tl.load(unit + 2), tl.load(unit + 3)


@triton.jit
def unit_sum(unit):
    """Of a unit: its k blocks [begin, end)."""
    return tl.load(unit + 5), tl.load(unit + 6)


@triton.jit
def unit_slice(unit):
    """Of a unit: its slice, how many there are, the place of the first one's sums, its tile."""
    return tl.load(unit + 9), tl.load(unit + 10), tl.load(unit + 11), tl.load(unit + 13)


@triton.jit
def multiple(value, N: tl.constexpr):
    """``value``, a multiple of N, so that the compiler sees it: a hint on what was loaded is lost
    on Triton 3.6."""
    return value // N * N


@triton.jit
def region_box(region):
    """Of a region: its first row and column of the map, its height and width."""
    return tl.load(region), tl.load(region + 1), tl.load(region + 2), tl.load(region + 3)


@triton.jit
def region_branch(region):
    """Whose output a region is."""
    return tl.load(region + 7)


@triton.jit
def region_runs(region):
    """Of a region: its runs of taps [begin, end)."""
    return tl.load(region + 8), tl.load(region + 9)


@triton.jit
def pixels_of(region, rows, height, width):
    """The pixels that a region's rows are: (index in the batch, image, y, x), each like ``rows``.

    A region's rows count its columns, its rows and the images, in this order.
    """
    y0, x0, lines, columns = region_box(region)
    line = rows // columns
    x = x0 + rows - line * columns
    image = line // lines
    y = y0 + line - image * lines
    return (image * height + y) * width + x, image, y, x


@triton.jit
def run_taps(run):
    """Of a run of taps: its branch, the index of the first weight, how far that reads in y and in
    x, and the taps of a row of it."""
    return (
        tl.load(run),
        tl.load(run + 1),
        tl.load(run + 2),
        tl.load(run + 3),
        tl.load(run + 4),
    )


@triton.jit
def run_steps(run):
    """Of a run: from row to row of taps, in weights and in y; from tap to tap, in x."""
    return tl.load(run + 5), tl.load(run + 6), tl.load(run + 7)


@triton.jit
def run_blocks(run):
    """Of a run: its first k block in the region, the k blocks of a tap, how many taps it has."""
    return tl.load(run + 8), tl.load(run + 9), tl.load(run + 10)


@triton.jit
def next_tap(is_last, row, column, columns):
    """One tap further in a run of rows of ``columns`` taps, if this was the last block of one."""
    column = tl.where(is_last, column + 1, column)
    wraps = column == columns
    return tl.where(wraps, row + 1, row), tl.where(wraps, 0, column)


@triton.jit
def branch_input(branch):
    """Of a branch: its first channel in the left operand and how many there are, in chunks; the
    taps of its weight."""
    return tl.load(branch), tl.load(branch + 1), tl.load(branch + 2)


@triton.jit
def branch_output(branch):
    """Of a branch: its first channel in the output and how many it has there, in chunks."""
    return tl.load(branch + 3), tl.load(branch + 4)


@triton.jit
def weight_rows(branch):
    """Of a branch: the output channels of its weight."""
    return tl.load(branch + 5)


@triton.jit
def branch_vector(branch):
    """Of a branch: its first entry in vectors of all output channels."""
    return tl.load(branch + 6)


@triton.jit
def pick(pointers, index, COUNT: tl.constexpr):
    """``pointers[index]``, where the index is known when the kernel runs."""
    picked = pointers[0]
    for i in tl.static_range(1, COUNT):
        picked = tl.where(index == i, pointers[i], picked)
    return picked
