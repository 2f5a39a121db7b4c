# SPDX-License-Identifier: BSD-3-Clause
"""The pyramid kernels themselves, run on the CPU: exact, without a race or an access out of bounds.

The second half tests these tests: a fault planted in the kernels' sources must be noticed.
"""

from __future__ import annotations

from pathlib import Path

import emulated
import pytest
from planted_faults import (
    MATHS,
    RACE,
    check_noticed,
    check_orders,
    check_passes,
    copy_sources,
    faulty_program,
)

SOURCES = ("csrc/plan/*.cpp", "csrc/cuda/kernels/*.cu")
PASSES = {"forward": 0, "grad_input": 1, "grad_weight": 2}
PROBLEMS = {"plain": 150, "address": 20, "thread": 12}


@pytest.fixture(scope="module")
def programs() -> dict[str, Path]:
    return emulated.build("pyramid_check", list(emulated.VARIANTS), *SOURCES)


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("variant", emulated.VARIANTS)
def test_random_problems_are_exact(programs, variant, name, math) -> None:
    arguments = (PROBLEMS[variant], PASSES[name], MATHS[math])
    check_passes(programs[variant], 1, *arguments, ASPP_EMULATE_SEED="7")


def test_order_of_blocks_and_threads_does_not_matter(programs) -> None:
    check_orders(programs["plain"], 40)


# fault: file, what to replace, by what, pass, build that notices it, what that says (None: wrong
# bits)
FAULTS = {
    "dropped_barrier": (
        "pyramid_sm80.cuh",
        "      ptx::sync_block();  // all have",
        "      // all have",
        "forward",
        "thread",
        RACE,
    ),
    "missing_wait": (
        "pyramid_sm80.cuh",
        "cp_async_wait<C::kStages - 2>",
        "cp_async_wait<C::kStages - 1>",
        "forward",
        "plain",
        "committed but not waited for|got",
    ),
    "shifted_tap": (
        "loaders.cuh",
        "shift_ = tap.dy * p_.width + tap.dx",
        "shift_ = tap.dy * p_.width + tap.dx + 1",
        "grad_input",
        "plain",
        None,
    ),
    "tail_too_long": (
        "epilogue.cuh",
        "const bool inside = row < unit.m_count;",
        "const bool inside = row <= unit.m_count;",
        "grad_weight",
        "address",
        "heap-buffer-overflow",
    ),
    "tail_too_short": (
        "epilogue.cuh",
        "const bool inside = row < unit.m_count;",
        "const bool inside = row + 1 < unit.m_count;",
        "forward",
        "plain",
        None,
    ),
    "channels_too_long": (
        "loaders.cuh",
        "const bool inside = channel < channels_;",
        "const bool inside = channel <= channels_;",
        "forward",
        "plain",
        None,
    ),
    "padding_not_tested": (
        "loaders.cuh",
        "if (region.padded != 0) {",
        "if (region.padded > 1) {",
        "forward",
        "plain",
        None,
    ),
    "table_overwritten": (
        "loaders.cuh",
        "    written_ ^= 1;",
        "",
        "grad_weight",
        "thread",
        RACE,
    ),
    "missing_fence": (
        "slices.cuh",
        "      ptx::fence_device();\n    }",
        "    }",
        "forward",
        "thread",
        RACE,
    ),
    "slices_out_of_bounds": (
        "slices.cuh",
        "slice < unit.slices; ++slice",
        "slice <= unit.slices; ++slice",
        "grad_input",
        "address",
        "heap-buffer-overflow",
    ),
    "wrong_swizzle": (
        "warp_math.cuh",
        "LaneA(m + lane % 16, lane / 16)",
        "LaneA(m + lane % 16, 1 - lane / 16)",
        "forward",
        "plain",
        None,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_noticed(programs, folder, fault) -> None:
    name, right, wrong, of_pass, variant, says = FAULTS[fault]
    program = faulty_program(
        folder, (name, right, wrong), "pyramid_bfloat16_sm80.cu", "pyramid_check", variant, SOURCES
    )
    check_noticed(program, (1, 60, PASSES[of_pass], 0), says)
