# SPDX-License-Identifier: BSD-3-Clause
"""What an operator's call asks of the CUDA runtime.

The emulation writes down every call; nothing here is seen by PyTorch, whose tensors are the CPU's.
"""

from __future__ import annotations

import ctypes
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from marks import on_emulated
from table import PYRAMIDS, SEPARABLE

from aspp_ext import _native
from aspp_ext.ops.head_composed import aspp_inference
from aspp_ext.testing import OPS, PROBLEMS, Branch, Problem, laid_out, oracle_of, outputs

pytestmark = on_emulated
# Sums long enough to be sliced, channels that may be read in place.
BRANCHES = (Branch(40, (1, 1)), Branch(40, (3, 3), (6, 6)))
SLICED = Problem("sliced", (1, 1024, 9, 9), BRANCHES)
IN_PLACE = Problem("in place", (2, 64, 9, 9), BRANCHES, "channels_last", "channels_last")
ARCHITECTURES = [80, 86, 90, 100, 120]
ALLOWED = {"cudaGetDevice", "cudaDeviceGetAttribute", "cudaStreamIsCapturing", "launch"}
ALLOWED |= {"cudaFuncSetAttribute", "cudaMemsetAsync"}


class Emulation:
    """The device, and the log of the calls made to it."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(_native.library_dir() / "libaspp_cpu.so"))
        self.library.aspp_emulation_log.restype = ctypes.c_char_p
        self.library.aspp_emulation_set.argtypes = [ctypes.c_char_p, ctypes.c_longlong]

    def set(self, name: str, value: int) -> None:
        assert self.library.aspp_emulation_set(name.encode(), value) == 0, f"cannot set {name}"

    def calls_of(self, function, *arguments) -> tuple[list[torch.Tensor], list[dict]]:
        self.library.aspp_emulation_clear_log()
        results = outputs(function(*arguments))
        return results, json.loads(self.library.aspp_emulation_log())


@pytest.fixture
def emulation() -> Iterator[Emulation]:
    found = Emulation()
    yield found
    found.set("architecture", 90)
    found.set("fail_allocations", 0)
    found.set("stream", 0)
    found.set("seed", 0)


OPERATORS = (*PYRAMIDS, *SEPARABLE)
each_operator = pytest.mark.parametrize(
    ("name", "way"),
    [(name, "") for name in OPERATORS]
    + [(name, way) for name in SEPARABLE if "backward" not in name for way in ("fused", "stored")],
)


def kernels(events: list[dict]) -> Counter[str]:
    return Counter(e["kernel"].partition("<")[0] for e in events if e["call"] == "launch")


@each_operator
def test_the_second_call_of_a_shape_only_launches(name, way, emulation, go) -> None:
    """No allocation but PyTorch's, no copy, no wait; and all of it on the caller's stream."""
    go(way)
    op = OPS[name]
    new = replace(SLICED, shape=(1, 1024, 9, 10 + len(f"{name} {way}")))
    arguments = op.make(new, torch.bfloat16, integer=True)
    emulation.set("stream", 1)
    first, events = emulation.calls_of(op.native, *arguments)
    assert {"cudaMalloc", "cudaStreamSynchronize"} <= {e["call"] for e in events}
    second, events = emulation.calls_of(op.native, *arguments)
    assert all(map(torch.equal, first, second))
    assert {e["call"] for e in events} <= ALLOWED
    if name in PYRAMIDS:
        assert kernels(events)["pyramid_kernel"] == 1
    used = {e["stream"] for e in events if e["call"] in ("launch", "cudaMemsetAsync")}
    assert len(used) == 1
    assert used != {0}


@each_operator
def test_memory_is_made_room_for_once(name, way, emulation, go) -> None:
    """Where CUDA has none left for a work list, as it may all lie in PyTorch's cache."""
    go(way)
    op = OPS[name]
    new = replace(SLICED, shape=(1, 1024, 11, 10 + len(f"{name} {way}")))
    arguments = op.make(new, torch.bfloat16, integer=True)
    emulation.set("fail_allocations", 2)
    with pytest.raises(RuntimeError, match="out of memory"):
        op.native(*arguments)
    emulation.set("fail_allocations", 1)
    got, events = emulation.calls_of(op.native, *arguments)
    results = [e["result"] for e in events if e["call"] == "cudaMalloc"]
    assert results[:2] == ["cudaErrorMemoryAllocation", "cudaSuccess"]
    assert all(map(torch.equal, got, outputs(op.native(*arguments))))


@pytest.mark.parametrize("name", PYRAMIDS)
def test_channels_last_is_read_in_place(name, emulation) -> None:
    op = OPS[name]
    _, events = emulation.calls_of(op.native, *op.make(IN_PLACE, torch.bfloat16))
    found = kernels(events)
    if name == "pyramid_grad_weight":
        del found["transpose_kernel"]  # of the results
    assert found == {"pyramid_kernel": 1}


@pytest.mark.parametrize("way", ["", "stored"])
@pytest.mark.parametrize("between", [False, True])
def test_a_separable_forward_is_one_launch_or_two(between, way, emulation, go) -> None:
    """And what packs depthwise weights and what is between, which are small."""
    go(way)
    op = OPS["separable_between_epilogue" if between else "separable"]
    _, events = emulation.calls_of(op.native, *op.make(IN_PLACE, torch.bfloat16))
    found = kernels(events)
    packing = (found.pop("pack_filters_kernel"), found.pop("pack_affine_kernel", 0))
    assert packing == (1, int(between))
    stored = {"depthwise_kernel": 1, "pyramid_kernel": 1}
    assert found == (stored if way else {"separable_kernel": 1})


@pytest.mark.parametrize("name", [name for name in SEPARABLE if "backward" in name])
def test_a_separable_backward_reads_channels_last_in_place(name, emulation) -> None:
    op = OPS[name]
    _, events = emulation.calls_of(op.native, *op.make(IN_PLACE, torch.bfloat16))
    found = kernels(events)
    assert "transpose_kernel" not in found
    assert found["pyramid_kernel"] == 2 * len(BRANCHES), "two gradients of each 1x1"


def test_the_head_runs_as_two_launches(emulation) -> None:
    """With the weights as ``fold`` lays them out on CUDA."""
    x, depthwise, weights, *rest = OPS["head"].make(IN_PLACE, torch.bfloat16)
    weights = [laid_out(w, "channels_last") for w in weights]
    _, events = emulation.calls_of(aspp_inference, x, depthwise, weights, *rest)
    assert kernels(events) == {"pyramid_kernel": 2}
    contiguous = x.contiguous()
    _, events = emulation.calls_of(aspp_inference, contiguous, depthwise, weights, *rest)
    assert kernels(events) == {"pyramid_kernel": 2, "transpose_kernel": 1}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", OPERATORS)
def test_exact_with_the_tiles_of_every_architecture(name, architecture, emulation) -> None:
    emulation.set("architecture", architecture)
    op = OPS[name]
    for problem in (SLICED, PROBLEMS["channel_blocks_dense"], PROBLEMS["outputs_not_of_16"]):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            arguments = op.make(problem, dtype, integer=True)
            got, events = emulation.calls_of(op.native, *arguments)
            expected = [t.to(dtype) for t in oracle_of(op, arguments)]
            assert all(map(torch.equal, got, expected)), f"{problem.name}, {dtype}"
            assert {e["result"] for e in events} == {"cudaSuccess"}


@each_operator
def test_the_order_of_blocks_and_threads_changes_no_bit(name, way, emulation, go) -> None:
    go(way)
    arguments = OPS[name].make(SLICED, torch.float32)
    expected = outputs(OPS[name].native(*arguments))
    for seed in range(1, 6):
        emulation.set("seed", seed)
        assert all(map(torch.equal, outputs(OPS[name].native(*arguments)), expected))


def test_an_empty_batch_launches_nothing(emulation) -> None:
    for name in OPERATORS:
        _, events = emulation.calls_of(
            OPS[name].native, *OPS[name].make(PROBLEMS["empty_batch"], torch.float32)
        )
        assert not kernels(events)
