# SPDX-License-Identifier: BSD-3-Clause
"""The depthwise kernels themselves, run on the CPU: exact, without a race or an access out of
bounds.

The second half tests these tests: a fault planted in the kernels' sources must be noticed.
"""

from __future__ import annotations

from pathlib import Path

import emulated
import pytest
from planted_faults import (
    MATHS,
    OUTSIDE,
    RACE,
    check_noticed,
    check_orders,
    check_passes,
    copy_sources,
    faulty_program,
)

KERNEL_FILES = ("combine", "between_grad", "depthwise", "depthwise_grad_input")
KERNEL_FILES += ("depthwise_grad_weight", "depthwise_parts")
SOURCES = tuple(f"csrc/cuda/kernels/{name}_sm80.cu" for name in KERNEL_FILES)
KERNELS = {"forward": 0, "between_grad": 1, "grad_weight": 2, "grad_input": 3}
PROBLEMS = {"plain": 150, "address": 20, "thread": 8}


@pytest.fixture(scope="module")
def programs() -> dict[str, Path]:
    return emulated.build("depthwise_check", list(emulated.VARIANTS), *SOURCES)


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("variant", emulated.VARIANTS)
def test_random_problems_are_exact(programs, variant, name, math) -> None:
    arguments = (PROBLEMS[variant], KERNELS[name], MATHS[math])
    check_passes(programs[variant], 1, *arguments, ASPP_EMULATE_SEED="7")


def test_order_of_blocks_and_threads_does_not_matter(programs) -> None:
    check_orders(programs["plain"], 40)


# fault: file, what to replace, by what, the kernel's file and number, build that notices it, what
# that says (None: wrong bits)
FAULTS = {
    "places_read_too_soon": (
        "depthwise_sm80.cu",
        "  ptx::sync_block();\n  DepthwiseSums",
        "  DepthwiseSums",
        ("depthwise", 0),
        "thread",
        RACE,
    ),
    "places_overwritten": (
        "depthwise_grad_weight_sm80.cu",
        "    ptx::sync_block();\n    find_places",
        "    find_places",
        ("depthwise_grad_weight", 2),
        "thread",
        RACE,
    ),
    "sums_read_too_soon": (
        "depthwise.cuh",
        "  ptx::sync_block();\n  for (int place",
        "  for (int place",
        ("between_grad", 1),
        "thread",
        RACE,
    ),
    "means_read_too_soon": (
        "depthwise_sm80.cu",
        "      ptx::sync_block();\n    };",
        "    };",
        ("depthwise", 0),
        "thread",
        RACE,
    ),
    "tail_too_long": (
        "depthwise.cuh",
        "places[thread] = number < pixels ?",
        "places[thread] = number <= pixels ?",
        ("depthwise", 0),
        "address",
        OUTSIDE,
    ),
    "column_not_tested": (
        "depthwise.cuh",
        "(live_rows >> i & 1) != 0 && uint32_t(x[i]) + dx < uint32_t(shape.width)",
        "(live_rows >> i & 1) != 0 && uint32_t(x[i]) + dx <= uint32_t(shape.width)",
        ("depthwise_grad_input", 3),
        "plain",
        None,
    ),
    "dead_taps_read": (
        "depthwise.cuh",
        "columns(depthwise_reach(branch.kernel_w, branch.rate_w, shape.width))",
        "columns(branch.kernel_w / 2)",
        ("depthwise", 0),
        "address",
        "signed integer overflow|got",
    ),
    "channels_too_long": (
        "depthwise.cuh",
        "inside(channel < shape.pitch)",
        "inside(channel <= shape.pitch)",
        ("depthwise", 0),
        "address",
        OUTSIDE,
    ),
    "not_mirrored": (
        "depthwise.cuh",
        "const int32_t dy = (kMirrored ? -row : row)",
        "const int32_t dy = row",
        ("depthwise_grad_input", 3),
        "plain",
        None,
    ),
    "last_tile_forgotten": (
        "depthwise_grad_weight_sm80.cu",
        "tiles * (part + 1) / p.parts",
        "(tiles * (part + 1) - 1) / p.parts",
        ("depthwise_grad_weight", 2),
        "plain",
        None,
    ),
    "part_too_many": (
        "depthwise_parts_sm80.cu",
        "part < p.parts; part",
        "part <= p.parts; part",
        ("depthwise_parts", 1),
        "address",
        OUTSIDE,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_noticed(programs, folder, fault) -> None:
    name, right, wrong, (of_file, of_kernel), variant, says = FAULTS[fault]
    program = faulty_program(
        folder, (name, right, wrong), f"{of_file}_sm80.cu", "depthwise_check", variant, SOURCES
    )
    check_noticed(program, (1, 60, of_kernel, 0), says)
