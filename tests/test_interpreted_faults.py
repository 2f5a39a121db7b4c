# SPDX-License-Identifier: BSD-3-Clause
"""Faults planted in what Triton's kernels are told: each of them changes a result.

None writes outside of what a kernel may write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from marks import on_interpreted
from table import CUT, call_of
from torch import Tensor

from aspp_ext import _triton
from aspp_ext.testing import OPS, Branch, Problem
from aspp_ext.testing.checks import check_integers

if _triton.missing is not None:
    pytest.skip(_triton.missing, allow_module_level=True)

from triton.runtime import interpreter

from aspp_ext.triton import work

pytestmark = on_interpreted
# As in records.py and csrc/plan/work_list.h.
UNIT = {"m_count": 2, "n_begin": 3, "k_end": 6, "slice": 9, "slices": 10, "slot": 11}
REGION = {"y": 0, "x": 1, "height": 2, "width": 3, "run_begin": 8, "run_end": 9}
RUN = {"index": 1, "dy": 2, "dx": 3, "first_block": 8, "count": 10}
BRANCH = {"a_first": 0, "a_extent": 1, "taps": 2, "out_first": 3, "rows": 5, "vector": 6}
FIELDS = {"units": (14, UNIT), "regions": (10, REGION), "runs": (11, RUN), "branches": (7, BRANCH)}

PAIR = Problem("pair", (2, 24, 6, 7), (Branch(20, (1, 1)), Branch(12, (3, 3), (2, 3))))


class Records:
    """A kind of record of a work list, by the names of its fields."""

    def __init__(self, found: work.Work, kind: str, count: int) -> None:
        size, self.names = FIELDS[kind]
        self.table = getattr(found, kind)[: count * size].view(count, size)

    def __getitem__(self, name: str) -> Tensor:
        return self.table[:, self.names[name]]

    def shift(self, name: str, by: int, where: Tensor) -> None:
        """Changes the last record there."""
        assert where.any(), "there is no such record"
        self.table[where.nonzero()[-1], self.names[name]] += by


Change = Callable[[Records], None]


class Fault(NamedTuple):
    op: str
    kind: str
    change: Change
    problem: Problem | None = None  # as in CUT


def shifted(name: str, by: int, where: Callable[[Records], Tensor] | None = None) -> Change:
    def change(records: Records) -> None:
        chosen = torch.ones_like(records[name]) > 0 if where is None else where(records)
        records.shift(name, by, chosen)

    return change


def without_rows(records: Records) -> None:
    records["m_count"][-1] = 0


def later_slice(r: Records) -> Tensor:
    return r["slice"] > 0


FORWARD, INPUT, WEIGHT = "pyramid", "pyramid_grad_input", "pyramid_grad_weight"
FAULTS = {
    "a slice in another's place": Fault(FORWARD, "units", shifted("slot", -1, later_slice)),
    "so in grad_input": Fault(INPUT, "units", shifted("slot", -1, later_slice)),
    "so in grad_weight": Fault(WEIGHT, "units", shifted("slot", -1, later_slice)),
    "a slice too short": Fault(FORWARD, "units", shifted("k_end", -1, later_slice)),
    "a slice of grad_weight too short": Fault(WEIGHT, "units", shifted("k_end", -1, later_slice)),
    "a slice forgotten": Fault(INPUT, "units",
        shifted("slices", -1, lambda r: (r["slices"] > 1) & (r["slice"] == 0))),
    "a row too few": Fault(FORWARD, "units", shifted("m_count", -1), PAIR),
    "a tile without rows": Fault(INPUT, "units", without_rows, PAIR),
    "a region a row up": Fault(FORWARD, "regions", shifted("y", -1, lambda r: r["y"] > 0)),
    "a region a column left": Fault(WEIGHT, "regions", shifted("x", -1, lambda r: r["x"] > 0)),
    "a run of taps left out": Fault(INPUT, "regions",
        shifted("run_end", -1, lambda r: r["run_end"] > r["run_begin"])),
    "a tap a row off": Fault(FORWARD, "runs", shifted("dy", 1)),
    "a tap a column off": Fault(INPUT, "runs", shifted("dx", -1)),
    "another tap's weight": Fault(FORWARD, "runs", shifted("index", -1, lambda r: r["index"] > 0)),
    "another tap's gradient": Fault(WEIGHT, "runs", shifted("index", -1, lambda r: r["index"] > 0)),
    "a tap too few": Fault(INPUT, "runs", shifted("count", -1)),
    "channels left out": Fault(FORWARD, "branches", shifted("a_extent", -1)),
    "outputs left out": Fault(INPUT, "branches", shifted("rows", -1)),
    "a row of a weight left out": Fault(WEIGHT, "branches", shifted("rows", -1)),
    "a branch in another's place": Fault(FORWARD, "branches", shifted("out_first", -1)),
    "another branch's gradient": Fault(WEIGHT, "branches", shifted("a_first", -1)),
    "another channel's scale": Fault("pyramid_epilogue", "branches", shifted("vector", -1)),
    "a region of the separable up": Fault("separable", "regions",
        shifted("y", -1, lambda r: r["y"] > 0), PAIR),
}  # fmt: skip


@pytest.fixture
def plant(monkeypatch) -> Callable[[Fault], None]:
    find = work.find

    def planted(fault: Fault) -> None:
        def spoilt(target: Any, pass_: str, shape: work.Shape, *rest: Any) -> work.Work:
            found = find(target, pass_, shape, *rest)
            work._entries.clear()  # as nobody else is to find it
            counts = {"units": found.unit_count, "branches": len(shape.branches)}
            regions = found.units[: found.unit_count * 14].view(-1, 14)[:, 0].max() + 1
            ends = found.regions[: int(regions) * 10].view(-1, 10)[:, 9]
            counts |= {"regions": int(regions), "runs": int(ends.max())}
            fault.change(Records(found, fault.kind, counts[fault.kind]))
            return found

        monkeypatch.setattr(work, "find", spoilt)

    return planted


def check(name: str, problem: Problem) -> None:
    op = OPS[name]
    check_integers(call_of(op), op, op.make(problem, torch.float32, integer=True))


@pytest.mark.prove  # most of it is in test_interpreted_kernels.py
@pytest.mark.parametrize("name", CUT)
def test_without_a_fault(name) -> None:
    for problem in (CUT[name], PAIR):
        check(name, problem)


QUICK = ("a slice in another's place", "a region a row up", "a tap a row off", "channels left out")


@pytest.mark.quick(when=lambda name: name in QUICK)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_work_list(name, plant) -> None:
    fault = FAULTS[name]
    plant(fault)
    with pytest.raises(AssertionError, match="numbers differ"):
        check(fault.op, fault.problem or CUT[fault.op])


# Of a kernel: an argument, and what is put in its place.
ARGUMENTS = {
    "a map too low": (FORWARD, "gather_kernel", "height", lambda v: v - 1, None),
    "a map too narrow": (INPUT, "gather_kernel", "width", lambda v: v - 1, None),
    "no scale": ("pyramid_epilogue", "gather_kernel", "has_scale", lambda v: 0, PAIR),
    "no shift": ("pyramid_epilogue", "gather_kernel", "has_shift", lambda v: 0, PAIR),
    "no activation": ("pyramid_epilogue", "gather_kernel", "relu", lambda v: 0, PAIR),
    "one shift for all": ("pyramid_epilogue", "gather_kernel", "shift_pitch", lambda v: 0, PAIR),
    "no activation of sums of slices": ("pyramid_epilogue", "finish_gather_kernel", "relu",
        lambda v: 0, None),
    "rows too near": (WEIGHT, "grad_weight_kernel", "b_chunks", lambda v: v - 1, None),
    "not mirrored": (INPUT, "gather_kernel", "GRAD_INPUT", lambda v: False, PAIR),
    "between left out": ("separable_between_epilogue", "separable_kernel", "between_relu",
        lambda v: 0, PAIR),
}  # fmt: skip


@pytest.mark.quick(when=lambda name: name in ("no shift", "not mirrored"))
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_fault_in_an_argument(name, monkeypatch) -> None:
    op, kernel, argument, changed, problem = ARGUMENTS[name]
    call, planted = interpreter.GridExecutor.__call__, []

    def spoilt(self: Any, *arguments: Any, **named: Any) -> None:
        if self.fn.__name__ == kernel:
            planted.append(named[argument])
            named[argument] = changed(named[argument])
            assert named[argument] != planted[-1]
        call(self, *arguments, **named)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", spoilt)
    with pytest.raises(AssertionError, match="numbers differ"):
        check(op, problem or CUT[op])
    assert planted
