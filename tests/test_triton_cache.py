# SPDX-License-Identifier: BSD-3-Clause
"""The work lists that Triton's operators keep: which, for how long, and who waits for whom."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from table import INTERPRETED
from torch.utils._python_dispatch import TorchDispatchMode

from aspp_ext import _triton

if _triton.missing is not None:
    pytest.skip(_triton.missing, allow_module_level=True)
if INTERPRETED:
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from triton_mock import Device, pretended

from aspp_ext.triton import operators, work
from aspp_ext.triton.target import Target, target_of

TILE = work.Tile(128, 64, 32)
BRANCHES = (((3, 3), (2, 2), 8),)


@pytest.fixture
def device() -> Iterator[Device]:
    with pretended("sm_90") as found:
        yield found


@pytest.fixture
def plans(monkeypatch) -> list[work.Shape]:
    """The shapes that are planned from now on."""
    seen: list[work.Shape] = []
    upload = work._upload

    def spy(target: Target, pass_: str, shape: work.Shape, *rest) -> work.Work:
        seen.append(shape)
        return upload(target, pass_, shape, *rest)

    monkeypatch.setattr(work, "_upload", spy)
    return seen


def find(width: int) -> work.Work:
    target = target_of(torch.device("cpu"))
    shape = work.Shape(1, 4, width, 8, BRANCHES)
    return work.find(target, "forward", shape, TILE, [work.Branch(rows=8, taps=9)])


def capture(monkeypatch, is_capturing: bool = True) -> None:
    monkeypatch.setattr(Target, "is_capturing", lambda self: is_capturing)


def test_a_shape_is_planned_once(device, plans) -> None:
    assert find(5) is find(5)
    assert find(6) is not find(5)
    assert [shape.width for shape in plans] == [5, 6]


def test_everything_that_matters_is_told_apart(device, plans) -> None:
    target = target_of(torch.device("cpu"))
    shape, branches = work.Shape(1, 4, 5, 8, BRANCHES), [work.Branch(rows=8, taps=9)]
    calls = [
        (target, "forward", shape, TILE, branches),
        (target._replace(processors=7), "forward", shape, TILE, branches),
        (target, "grad_input", shape, TILE, branches),
        (target, "forward", shape._replace(in_channels=16), TILE, branches),
        (target, "forward", shape, TILE._replace(n=128), branches),
        (target, "forward", shape, TILE, [branches[0]._replace(a_extent=2)]),
    ]
    found = [work.find(*call) for call in calls]
    assert len({id(w) for w in found}) == len(plans) == len(calls)


def test_the_least_recently_used_half_is_forgotten(device, plans, monkeypatch) -> None:
    waits: list[Target] = []
    monkeypatch.setattr(work, "CAPACITY", 8)
    monkeypatch.setattr(Target, "synchronize", lambda self: waits.append(self))
    for width in range(1, 9):
        find(width)
    find(1)
    assert not waits
    find(9)
    assert len(waits) == 1  # the devices may still read what is forgotten
    assert len(work._entries) == 5
    plans.clear()
    for width in (1, 7, 8, 9):
        find(width)
    assert not plans
    find(2)
    assert [shape.width for shape in plans] == [2]


def test_what_a_graph_has_captured_is_kept(device, plans, monkeypatch) -> None:
    monkeypatch.setattr(work, "CAPACITY", 4)
    kept = find(1)
    capture(monkeypatch)
    assert find(1) is kept
    capture(monkeypatch, False)
    for width in range(2, 40):
        find(width)
    assert len(work._entries) <= 5
    assert find(1) is kept


def test_a_new_shape_cannot_be_captured(device, plans, monkeypatch) -> None:
    x, w = torch.empty(1, 8, 4, 5), torch.empty(8, 8, 3, 3)
    capture(monkeypatch)
    with pytest.raises(RuntimeError) as refusal:
        operators.atrous_pyramid(x, [w], [2, 2])
    assert str(refusal.value) == (
        "aspp_ext: a CUDA graph can capture only what Triton has computed before; call it once "
        "outside of the capture"
    )
    assert not plans
    capture(monkeypatch, False)
    operators.atrous_pyramid(x, [w], [2, 2])
    capture(monkeypatch)
    operators.atrous_pyramid(x, [w], [2, 2])
    assert len(plans) == 1


def test_nothing_is_forgotten_while_capturing(device, monkeypatch) -> None:
    for width in range(1, 9):
        find(width)
    monkeypatch.setattr(work, "CAPACITY", 4)
    capture(monkeypatch)
    find(3)
    assert len(work._entries) == 8


class Seen(TorchDispatchMode):
    """What a thread computes."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(func.name())
        return func(*args, **(kwargs or {}))


def test_what_is_kept_is_made_by_another_thread(device) -> None:
    """PyTorch's memory pools, of CUDA graphs among them, are a thread's, as default devices and
    such modes are: what they have taken, they want back."""
    with torch.device("meta"), Seen() as seen:
        found = find(5)
    assert not seen.operators
    assert found.units.device == torch.device("cpu")
    assert found.units.any()


def test_threads_share_one_plan(device, plans, monkeypatch) -> None:
    upload, start = work._upload, threading.Barrier(4)

    def slow(*arguments) -> work.Work:
        time.sleep(0.05)
        return upload(*arguments)

    monkeypatch.setattr(work, "_upload", slow)
    found: list[work.Work] = []

    def run() -> None:
        start.wait()
        found.append(find(11))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(w is found[0] for w in found)
    assert len(plans) == 1


def test_a_refusal_of_the_planner_is_no_entry(device) -> None:
    target = target_of(torch.device("cpu"))
    shape = work.Shape(1, 4, 5, 8, (((2, 3), (1, 1), 8),))
    for _ in range(2):
        with pytest.raises(ValueError):
            work.find(target, "forward", shape, TILE, [work.Branch()])
    assert not work._entries
