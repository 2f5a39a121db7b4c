# SPDX-License-Identifier: BSD-3-Clause
"""The planner's work lists on the device: made once per shape, then found again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import _plan
from .target import Target

if TYPE_CHECKING:
    from .._plan import Pass

CAPACITY = 1024
"""Work lists that are kept; those that a CUDA graph has captured are kept besides."""

GROUP = 32
"""Channels of a program that combines statistics."""


class Shape(NamedTuple):
    """A pyramid as the planner sees it; ``branches`` are (kernel, rate, output channels)."""

    batch: int
    height: int
    width: int
    in_channels: int
    branches: tuple[tuple[tuple[int, int], tuple[int, int], int], ...]

    @property
    def pixels(self) -> int:
        return self.batch * self.height * self.width


class Tile(NamedTuple):
    """m x n of an output, k deep at a time: as ``_plan.Tile``."""

    m: int
    n: int
    k: int


class Branch(NamedTuple):
    """What a kernel reads of a branch: the fields of its record, see ``records.py``."""

    a_first: int = 0  # first channel in the left operand, in chunks
    a_extent: int = 0  # channels there, in chunks
    taps: int = 1  # of its weight
    out_first: int = 0  # first channel in the output, in chunks
    out_extent: int = 0  # channels there, in chunks
    rows: int = 0  # output channels
    vector: int = 0  # first entry in vectors of all output channels


class Work(NamedTuple):
    """A work list on a device; the tensors are int32."""

    units: Tensor
    regions: Tensor
    runs: Tensor
    branches: Tensor
    cut: Tensor  # the first units of the tiles that are cut into slices
    tile_rows: Tensor  # [tiles]
    groups: Tensor  # of channels whose statistics a program combines
    unit_count: int
    cut_count: int
    group_count: int
    partials: int  # places for the sums of slices
    tiles: int


class _Entry(NamedTuple):
    work: Work
    captured: bool


_entries: OrderedDict[tuple, _Entry] = OrderedDict()
_lock = threading.Lock()


def find(target: Target, pass_: Pass, shape: Shape, tile: Tile, branches: Sequence[Branch]) -> Work:
    """The work list of a pass over ``shape``.

    Raises:
        ValueError, OverflowError: the planner refuses the shape.
        RuntimeError: a CUDA graph is being captured and the shape is new.
    """
    key = (target, pass_, shape, tile, tuple(branches))
    capturing = target.is_capturing()
    with _lock:
        entry = _entries.get(key)
        if entry is None:
            if capturing:
                raise RuntimeError(
                    "aspp_ext: a CUDA graph can capture only what Triton has computed before; "
                    "call it once outside of the capture"
                )
            # By a thread without the caller's memory pool and default device: the pool of a CUDA
            # graph that is warmed up wants back all that is taken from it.
            with ThreadPoolExecutor(1) as another:
                made = another.submit(_upload, target, pass_, shape, tile, branches)
            entry = _Entry(made.result(), False)
        if capturing and not entry.captured:
            entry = entry._replace(captured=True)
        _entries[key] = entry
        _entries.move_to_end(key)
        if len(_entries) > CAPACITY and not capturing:
            _shrink()
        return entry.work


def _shrink() -> None:
    """Forgets the older half of what no graph refers to, when the devices are done with it."""
    old = [key for key, entry in _entries.items() if not entry.captured][: CAPACITY // 2]
    for target in {key[0] for key in old}:
        target.synchronize()
    for key in old:
        del _entries[key]


def _upload(
    target: Target, pass_: Pass, shape: Shape, tile: Tile, branches: Sequence[Branch]
) -> Work:
    """Plans and brings everything to the device in one copy."""
    listed = [_plan.Branch(kernel=k, rate=r, out_channels=o) for k, r, o in shape.branches]
    n, h, w, channels, _ = shape
    problem = _plan.Problem(n, h, w, listed, in_channels=channels)
    tail = max(tile.m // 2, 1)
    work = _plan.work_list(
        problem, pass_, "cheapest", _plan.Tile(*tile, tail=tail), workers=target.processors
    )
    units = _records(work.units, 14)[_records(work.launch_order, 1).flatten().long()]
    rows = torch.zeros(max(work.tiles, 1), dtype=torch.int32)
    rows[units[:, 13].long()] = units[:, 2]
    cut = ((units[:, 10] > 1) & (units[:, 9] == 0)).nonzero().flatten().int()
    groups = _channel_groups(work.branch_tiles, branches, tile.n)
    parts = [
        units,
        _records(work.regions, 10),
        _records(work.runs, 11),
        torch.tensor(branches, dtype=torch.int32),
        cut,
        rows,
        groups,
    ]
    there = _on_device(parts, target)
    counts = (len(units), len(cut), len(groups), work.partials, work.tiles)
    return Work._make((*there, *counts))


def _records(data: bytes, fields: int) -> Tensor:
    if not data:
        return torch.empty(0, fields, dtype=torch.int32)
    return torch.frombuffer(bytearray(data), dtype=torch.int32).view(-1, fields)


def _channel_groups(
    tiles: Sequence[tuple[int, int]], branches: Sequence[Branch], columns: int
) -> Tensor:
    """Per program of ``combine_kernel``: the first tile, how many, the step from one to the next,
    the first column in them, the channels, the first channel of the result."""
    groups = []
    for (first, count), branch in zip(tiles, branches, strict=True):
        across = -(-branch.rows // columns)  # tiles side by side
        for begin in range(0, branch.rows if count else 0, GROUP):
            width = min(GROUP, branch.rows - begin)
            place = (first + begin // columns, count // across, across)
            groups.append((*place, begin % columns, width, branch.vector + begin))
    return torch.tensor(groups, dtype=torch.int32).view(-1, 6)


def _on_device(parts: Sequence[Tensor], target: Target) -> list[Tensor]:
    """Copies of the parts in one piece of memory, each at a multiple of 16 bytes."""
    sizes = [-(-p.numel() // 4) * 4 for p in parts]
    packed = torch.zeros(max(sum(sizes), 1), dtype=torch.int32)
    begins = [sum(sizes[:i]) for i in range(len(parts))]
    for begin, part in zip(begins, parts, strict=True):
        packed[begin : begin + part.numel()] = part.flatten()
    there = packed.to(target.device)
    return [there[begin:] for begin in begins]
