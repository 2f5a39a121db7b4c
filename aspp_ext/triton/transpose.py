# SPDX-License-Identifier: BSD-3-Clause
"""Channels first to channels last and back, for images and for weights.

Half the work of a call on contiguous tensors would be PyTorch's copies between the two: they read
or write memory in steps of a whole row. Here a tile goes through shared memory, so that both sides
touch whole sectors.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .target import on_device

SIZES = ["rows", "columns", "padded_rows", "in_batch", "in_row", "out_batch", "out_row"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["source", "target"])
def transpose_kernel(
    source,  # [batch, rows, columns]: columns are neighbours
    target,  # [batch, columns, padded_rows]: rows are neighbours
    rows,
    columns,
    padded_rows,
    in_batch,  # steps from batch to batch and row to row, in IN_STEP
    in_row,
    out_batch,  # in OUT_STEP
    out_row,
    IN_STEP: tl.constexpr,
    OUT_STEP: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """``target[b, c, r] = source[b, r, c]``, zero for ``rows <= r < padded_rows``."""
    across = tl.cdiv(columns, C)
    line = tl.program_id(0) // across
    down = tl.cdiv(padded_rows, R)
    r = line % down * R + tl.arange(0, R)
    c = tl.program_id(0) % across * C + tl.arange(0, C)
    batch = (line // down).to(tl.int64)
    at = (batch * in_batch + r.to(tl.int64)[:, None] * in_row) * IN_STEP + c[None, :]
    tile = tl.load(source + at, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0)
    at = (batch * out_batch + c.to(tl.int64)[:, None] * out_row) * OUT_STEP + r[None, :]
    tl.store(target + at, tl.trans(tile), mask=(c < columns)[:, None] & (r < padded_rows)[None, :])


def _taken(steps: tuple[int, int], sizes: tuple[int, int]) -> tuple[int, ...]:
    """Of one element a step may be any number, also one that a kernel would be compiled for."""
    return tuple(step if size > 1 else 0 for step, size in zip(steps, sizes, strict=True))


def transpose(
    source: Tensor,
    target: Tensor,
    size: tuple[int, int, int],
    source_steps: tuple[int, int],
    target_steps: tuple[int, int],
    padded_rows: int | None = None,
) -> None:
    """``target[b, c, r] = source[b, r, c]`` in memory that begins where the tensors' data does.

    Args:
        source: neighbours are columns.
        target: neighbours are rows; of the same dtype and device.
        size: batch, rows and columns.
        source_steps: elements from batch to batch and from row to row.
        target_steps: elements from batch to batch and from column to column.
        padded_rows: up to which the target is filled with zeros; ``rows`` if not given.
    """
    batch, rows, columns = size
    padded_rows = rows if padded_rows is None else padded_rows
    chunk = 16 // source.dtype.itemsize
    of_source = _taken(source_steps, (batch, rows))
    of_target = _taken(target_steps, (batch, columns))
    in_step = chunk if all(s % chunk == 0 for s in of_source) else 1
    out_step = chunk if all(s % chunk == 0 for s in of_target) else 1
    tile = (16 if padded_rows <= 16 else 64, 16 if columns <= 16 else 64)
    tiles = triton.cdiv(padded_rows, tile[0]) * triton.cdiv(columns, tile[1])
    if batch * tiles == 0:
        return
    with on_device(source.device):
        transpose_kernel[(batch * tiles,)](
            source, target, rows, columns, padded_rows,
            *(s // in_step for s in of_source), *(s // out_step for s in of_target),
            IN_STEP=in_step, OUT_STEP=out_step, R=tile[0], C=tile[1],
            num_warps=8 if tile == (64, 64) else 4,  # with four, Triton 3.6 spills
        )  # fmt: skip
