# SPDX-License-Identifier: BSD-3-Clause
"""What Triton's operators launch and compile, on GPUs that Triton believes in."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import pytest
import torch
from table import INTERPRETED

from aspp_ext import _triton
from aspp_ext.testing import OPS, PROBLEMS, Branch, Problem

if _triton.missing is not None:
    pytest.skip(_triton.missing, allow_module_level=True)
if INTERPRETED:
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from triton_mock import GPUS, Launch, pretended

from aspp_ext.triton import operands, operators, work

NAMES = [name for name in OPS if not name.startswith("head")]
MOST = (2**31 - 1, 65535, 65535)
"""Programs along each axis of a grid."""
each_gpu = pytest.mark.parametrize("gpu", GPUS)
each_name = pytest.mark.parametrize("name", [*NAMES, "statistics"])


def call(name: str, problem: Problem, dtype: torch.dtype = torch.bfloat16) -> None:
    if name == "statistics":
        operators.atrous_pyramid_statistics(*OPS["pyramid"].make(problem, dtype)[:3])
    else:
        getattr(operators, OPS[name].name)(*OPS[name].make(problem, dtype))


def shapes(seed: int, count: int) -> list[Problem]:
    """Of four branches and of channels that take the same tile, otherwise of all kinds."""
    draw = random.Random(seed)
    found = []
    for i in range(count):
        size = tuple(draw.choice([1, 2, 3, 5, 16, 17]) for _ in range(3))
        channels, width = (draw.choice([65, 72, 96, 101, 112, 128]) for _ in range(2))
        kernels = [(draw.choice([1, 3, 5]), draw.choice([1, 3])) for _ in range(4)]
        branches = tuple(Branch(width, k, (draw.choice([1, 2, 16]),) * 2) for k in kernels)
        layout = draw.choice(["contiguous", "channels_last"])
        found.append(Problem(f"drawn {i}", (size[0], channels, *size[1:]), branches, layout))
    return found


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90", "gfx942"])
@each_name
def test_a_kernel_is_compiled_once_for_all_shapes(name, gpu) -> None:
    """Of the transpose there are forms, by what sizes and steps are multiples of."""
    with pretended(gpu) as device:
        for problem in shapes(1, 20):
            call(name, problem)
    counts = Counter(c.kernel for c in device.compilations)
    assert counts.pop("transpose_kernel") <= 16
    assert set(counts.values()) == {1}, counts


@each_gpu
def test_an_epilogue_compiles_nothing(gpu) -> None:
    x, weights, rates, *_ = OPS["pyramid"].make(PROBLEMS["aspp"], torch.float16)
    vector = torch.ones(sum(w.size(0) for w in weights) + 1, dtype=torch.float16)
    with pretended(gpu) as device:
        operators.atrous_pyramid(x, weights, rates)
        count = len(device.compilations)
        for scale, shift, relu in itertools.product((0, 1), (0, 1, 2), (False, True)):
            given = [vector[v - 1 : len(vector) + v - 2] if v else None for v in (scale, shift)]
            operators.atrous_pyramid(x, weights, rates, *given, relu)
        assert len(device.compilations) == count


def records(launch: Launch, name: str, fields: int, count: int) -> torch.Tensor:
    table = launch.arguments[name]
    assert table.dtype == torch.int32
    assert table.data_ptr() % 16 == 0
    assert table.numel() >= count * fields, name
    return table[: count * fields].view(count, fields).long()


def check_units(launch: Launch) -> None:
    """What the work list of a launch points at is there."""
    arguments = launch.arguments
    units = records(launch, "units", 14, launch.grid[0])
    regions = records(launch, "regions", 10, int(units[:, 0].max()) + 1)
    runs = records(launch, "runs", 11, int(regions[:, 9].max()))
    assert (regions[:, 8] <= regions[:, 9]).all()
    if "BRANCHES" in arguments:
        records(launch, "branches", 7, arguments["BRANCHES"])
        assert int(runs[:, 0].max()) < arguments["BRANCHES"]
    if "partials" in arguments and "N" in arguments:
        cut = units[units[:, 10] > 1]
        places = int((cut[:, 11] + cut[:, 10]).max()) if len(cut) else 0
        assert arguments["partials"].numel() >= places * arguments["M"] * arguments["N"]
        assert (cut[:, 9] < cut[:, 10]).all()
    if arguments.get("STATISTICS"):
        tiles = int(units[:, 13].max()) + 1
        assert arguments["means"].numel() >= tiles * arguments["N"]
    if "out_chunks" in arguments:
        chunks = arguments["out_chunks"] * arguments["CHUNK"]
        height, width = arguments["height"], arguments["width"]
        assert (regions[:, 0] + regions[:, 2] <= height).all()
        assert (regions[:, 1] + regions[:, 3] <= width).all()
        rows = int((units[:, 1] + units[:, 2]).max())
        assert arguments["out"].numel() % (height * width * chunks) == 0
        assert rows <= arguments["out"].numel() // chunks


def check_cut(launch: Launch) -> None:
    cut = launch.arguments["cut"][: launch.grid[0]].long()
    units = records(launch, "units", 14, int(cut.max()) + 1)
    assert (units[cut, 10] > 1).all()
    assert (units[cut, 9] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gpu", ["sm_90", "sm_120"])
@each_name
def test_launches_are_possible(name, gpu, dtype) -> None:
    filled = [p for p in PROBLEMS.values() if p.shape[0] > 0]
    with pretended(gpu) as device:
        for problem in [*filled, *shapes(2, 5)]:
            call(name, problem, dtype)
    for launch in device.launches:
        assert all(1 <= n <= most for n, most in zip(launch.grid, MOST, strict=True)), launch.kernel
        for argument in launch.arguments.values():
            for t in argument if isinstance(argument, tuple) else (argument,):
                assert not isinstance(t, torch.Tensor) or t.numel() > 0
                assert not isinstance(t, int) or abs(t) < 2**31
        if "units" in launch.arguments:
            (check_cut if "cut" in launch.arguments else check_units)(launch)


@each_name
def test_an_empty_batch_launches_nothing(name) -> None:
    if name == "statistics":
        pytest.skip("refused before")
    with pretended("sm_90") as device:
        call(name, PROBLEMS["empty_batch"])
        assert not device.launches


def of_any_size(*shape: int) -> torch.Tensor:
    return torch.zeros(1).expand(shape)


BEYOND = {
    "weight": lambda: operators.atrous_pyramid(
        of_any_size(1, 2**16, 1, 1), [of_any_size(2**15, 2**16, 1, 1)], [1, 1]
    ),
    "depthwise weight": lambda: operators.atrous_separable_pyramid(
        *(of_any_size(1, 2**20, 1, 1), [of_any_size(2**20, 1, 63, 63)]),
        *([of_any_size(1, 2**20, 1, 1)], [1, 1], [], []),
    ),
    "pixel": lambda: operators.atrous_pyramid_grad_weight(
        *(of_any_size(1, 1, 1, 1), of_any_size(1, 2**31 - 8, 1, 1), [1, 1], [1], [1, 1])
    ),
    "result's pixel": lambda: operands.out_rows(of_any_size(1), 1, [2**27] * 16),
}


@pytest.mark.parametrize("name", BEYOND)
def test_more_than_kernels_can_count_is_refused(name) -> None:
    said = f"elements of a {name.split()[-1]} go up to {2**31 - 2**10} with Triton, got "
    with pretended("sm_90") as device, pytest.raises(RuntimeError, match=said):
        BEYOND[name]()
    assert not any("units" in launch.arguments for launch in device.launches)


@pytest.mark.parametrize("gpu", ["sm_90", "gfx942"])
@each_name
def test_a_second_call_plans_nothing(name, gpu, monkeypatch) -> None:
    with pretended(gpu) as device:
        call(name, PROBLEMS["aspp"])
        count, compiled = len(device.launches), len(device.compilations)

        def planned(*_: Any) -> None:
            raise AssertionError("planned again")

        monkeypatch.setattr(work, "_upload", planned)
        call(name, PROBLEMS["aspp"])
        assert len(device.compilations) == compiled
        first, second = device.launches[:count], device.launches[count:]
    assert [(a.kernel, a.grid) for a in first] == [(b.kernel, b.grid) for b in second]


@pytest.mark.parametrize("problem", ["aspp", "x_channels_last"])
def test_the_launches_of_a_call(problem) -> None:
    """Nothing but the pyramid where all is read in place; a format costs a transpose each."""
    counts = {}
    with pretended("sm_90") as device:
        for name in ("pyramid", "pyramid_grad_input", "pyramid_grad_weight"):
            device.launches.clear()
            call(name, Problem("p", (2, 64, 9, 9), (Branch(64, (1, 1)), Branch(64, (3, 3), (2, 2))),
                *(("channels_last",) * 2 if problem == "x_channels_last" else ())))  # fmt: skip
            counts[name] = Counter(launch.kernel for launch in device.launches)
    transposes = {name: count.pop("transpose_kernel", 0) for name, count in counts.items()}
    if problem == "x_channels_last":
        assert transposes == {"pyramid": 0, "pyramid_grad_input": 0, "pyramid_grad_weight": 1}
    else:  # of the image, the 3x3 and each branch's result, or the 3x3's gradient
        assert transposes == {"pyramid": 4, "pyramid_grad_input": 3, "pyramid_grad_weight": 3}
    assert all(sum(count.values()) <= 2 for count in counts.values())
