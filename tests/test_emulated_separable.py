# SPDX-License-Identifier: BSD-3-Clause
"""The separable operators by way of memory: what they launch, and results that depend on how a
batch is cut and pixels are added up."""

from __future__ import annotations

import pytest
import torch
from marks import on_emulated
from table import dtype_id, each_dtype
from test_emulated_calls import ALLOWED, Emulation, kernels

from aspp_ext.testing import OPS, PROBLEMS, Branch, Problem, oracle_of, outputs
from aspp_ext.testing.checks import check_integers

pytestmark = on_emulated
NAMES = [name for name in OPS if name.startswith("separable")]
FORWARD = [name for name in NAMES if "backward" not in name]
BACKWARD = [name for name in NAMES if "backward" in name]
BRANCHES = (Branch(40, (1, 1)), Branch(40, (3, 3), (6, 6)), Branch(24, (3, 3), (2, 3)))
IN_PLACE = Problem("in place", (2, 64, 19, 9), BRANCHES, "channels_last", "channels_last")
# 16 MiB of a branch's results per image in float64, of which two fit.
CUT = Problem("cut", (5, 512, 64, 64), (Branch(3, (1, 3), (1, 70)), Branch(2, (1, 1))))
# More taps than a group has on both axes, groups that are not full, taps beyond the map.
TAPS = Problem("taps", (2, 20, 5, 11), (Branch(8, (5, 7), (2, 2)), Branch(8, (9, 1), (1, 3))))
TALL = Problem("tall", (1, 8, 300, 1), (Branch(8, (3, 3), (100, 2)), Branch(8, (7, 1), (40, 1))))


@pytest.fixture
def emulation():
    found = Emulation()
    yield found
    found.set("stream", 0)
    found.set("seed", 0)


@pytest.fixture(autouse=True)
def stored(go) -> None:
    go("stored")


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=dtype_id)
def test_integers_are_exact(name, problem, dtype) -> None:
    arguments = OPS[name].make(problem, dtype, integer=True)
    check_integers(OPS[name].native, OPS[name], arguments)


@each_dtype
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("problem", [TAPS, TALL], ids=lambda p: p.name)
def test_groups_of_taps_are_exact(name, problem, dtype) -> None:
    arguments = OPS[name].make(problem, dtype, integer=True)
    check_integers(OPS[name].native, OPS[name], arguments)


def test_slices_of_the_batch_are_exact(emulation) -> None:
    """The last is shorter; shifts per sample follow."""
    op = OPS["separable"]
    x, depthwise, pointwise, rates, *_ = op.make(CUT, torch.float64, integer=True)
    shift = torch.randint(-2, 3, (5, 5)).double()
    arguments = (x, depthwise, pointwise, rates, [], [], False, None, shift, True)
    got, events = emulation.calls_of(op.native, *arguments)
    assert torch.equal(got[0], oracle_of(op, arguments)[0])
    found = kernels(events)
    assert (found["depthwise_kernel"], found["pyramid_kernel"]) == (3, 3)


@pytest.mark.parametrize("name", NAMES)
def test_the_second_call_of_a_shape_only_launches(name, emulation) -> None:
    arguments = OPS[name].make(IN_PLACE, torch.bfloat16, integer=True)
    emulation.set("stream", 1)
    first = outputs(OPS[name].native(*arguments))
    second, events = emulation.calls_of(OPS[name].native, *arguments)
    assert all(map(torch.equal, first, second))
    assert {e["call"] for e in events} <= ALLOWED
    assert {e["result"] for e in events} == {"cudaSuccess"}
    used = {e["stream"] for e in events if e["call"] in ("launch", "cudaMemsetAsync")}
    assert len(used) == 1
    assert used != {0}


def test_launches(emulation) -> None:
    """Forward is one launch of each kind; of the gradients those that were asked for."""

    def launched(name: str, *needs: bool) -> dict[str, int]:
        arguments = list(OPS[name].make(IN_PLACE, torch.bfloat16))
        arguments[8:] = needs or arguments[8:]
        return kernels(emulation.calls_of(OPS[name].native, *arguments)[1])

    filters = {"pack_filters_kernel": 1}
    packing = filters | {"pack_affine_kernel": 1}
    forward = {"depthwise_kernel": 1, "pyramid_kernel": 1}
    assert launched("separable_between_epilogue") == forward | packing

    backward, between = "separable_backward", "separable_backward_between"
    for_x = {"pyramid_kernel": 3, "depthwise_grad_input_kernel": 1}
    assert launched(backward, True, False, False, False) == filters | for_x
    of_depthwise = {"depthwise_grad_weight_kernel": 2, "sum_parts_kernel": 2, "pyramid_kernel": 2}
    assert launched(backward, False, True, False, False) == filters | of_depthwise
    of_pointwise = {"depthwise_kernel": 2, "pyramid_kernel": 3}
    found = launched(between, False, False, True, False)
    assert found == packing | of_pointwise
    of_between = {"between_grad_kernel": 2, "sum_parts_kernel": 4, "pyramid_kernel": 2}
    assert launched(between, False, False, False, True) == of_between | packing


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_blocks_and_threads_changes_no_bit(name, emulation) -> None:
    arguments = OPS[name].make(IN_PLACE, torch.float32)
    expected = outputs(OPS[name].native(*arguments))
    for seed in range(1, 4):
        emulation.set("seed", seed)
        assert all(map(torch.equal, outputs(OPS[name].native(*arguments)), expected))


@pytest.mark.parametrize("name", BACKWARD)
def test_each_gradient_alone_is_the_same(name) -> None:
    """Whatever else is asked for."""
    arguments = list(OPS[name].make(IN_PLACE, torch.float32))
    together = OPS[name].native(*arguments[:8], True, True, True, True)
    for i, need in enumerate([[0], [1], [2], [3, 4]]):
        alone = OPS[name].native(*arguments[:8], *(j == i for j in range(4)))
        for j in range(5):
            expected = outputs(together[j]) if j in need else []
            got = [t for t in outputs(alone[j]) if j > 0 or t.numel() > 0]
            assert len(got) == len(expected)
            assert all(map(torch.equal, got, expected))


def test_an_empty_batch_launches_nothing(emulation) -> None:
    for name in NAMES:
        arguments = OPS[name].make(PROBLEMS["empty_batch"], torch.float32)
        assert not kernels(emulation.calls_of(OPS[name].native, *arguments)[1])
