# SPDX-License-Identifier: BSD-3-Clause
"""The fused separable kernel, run on the CPU: exact, without a race or an access out of bounds.

The second half tests these tests: a fault planted in the kernel's sources must be noticed.
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

SOURCES = ("csrc/plan/*.cpp", "csrc/cuda/kernels/separable*.cu")
FUSED = ("bfloat16", "float16", "tf32", "float32")
PROBLEMS = {"plain": 300, "address": 40, "thread": 20}


@pytest.fixture(scope="module")
def programs() -> dict[str, Path]:
    return emulated.build("separable_check", list(emulated.VARIANTS), *SOURCES)


@pytest.mark.parametrize("math", FUSED)
@pytest.mark.parametrize("variant", emulated.VARIANTS)
def test_random_problems_are_exact(programs, variant, math) -> None:
    arguments = (PROBLEMS[variant], MATHS[math])
    check_passes(programs[variant], 1, *arguments, ASPP_EMULATE_SEED="7")


def test_order_of_blocks_and_threads_does_not_matter(programs) -> None:
    check_orders(programs["plain"], 60)


# fault: file, what to replace, by what, build that notices it, what that says (None: wrong bits)
FAULTS = {
    "dropped_barrier": (
        "separable_sm80.cuh",
        "ptx::sync_block();  // all have A and B",
        "// all have A and B",
        "thread",
        RACE,
    ),
    "missing_wait": (
        "separable_sm80.cuh",
        "ptx::cp_async_wait<0>();",
        "ptx::cp_async_wait<1>();",
        "plain",
        "committed but not waited for|got",
    ),
    "tables_not_complete": (
        "fused_loads.cuh",
        "ptx::sync_block();  // the tables are complete",
        "// the tables are complete",
        "thread",
        RACE,
    ),
    "one_stage_of_pixels": (
        "fused_loads.cuh",
        "load_pixels(block + 2);",
        "load_pixels(block + 1);",
        "plain",
        None,
    ),
    "halo_ends_too_early": (
        "fused_loads.cuh",
        "centre - halo.columns < unit.m_begin + unit.m_count",
        "centre - halo.columns + 1 < unit.m_begin + unit.m_count",
        "plain",
        None,
    ),
    "rows_in_plain_order": (
        "phases.cuh",
        "(from - phase * rows) * rate_",
        "(from - phase * rows)",
        "plain",
        None,
    ),
    "phase_not_tested": (
        "fused_loads.cuh",
        "const bool here = uint32_t(y) < uint32_t(p_.height) &&",
        "const bool here = y < p_.height &&",
        "plain",
        None,
    ),
    "dead_tap_taken": (
        "fused_rows.cuh",
        "everywhere_ &= taps_[i];",
        "",
        "plain",
        None,
    ),
    "tail_too_long": (
        "epilogue.cuh",
        "const bool inside = row < unit.m_count;",
        "const bool inside = row <= unit.m_count;",
        "address",
        "heap-buffer-overflow|got",
    ),
    "affine_of_the_next_block": (
        "fused_rows.cuh",
        "add_between(sums, memory_.affine(block & 1))",
        "add_between(sums, memory_.affine(~block & 1))",
        "plain",
        None,
    ),
    "weights_too_long": (
        "fused_loads.cuh",
        "inside && row < rows);",
        "inside && row <= rows);",
        "address",
        "heap-buffer-overflow",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_noticed(programs, folder, fault) -> None:
    name, right, wrong, variant, says = FAULTS[fault]
    program = faulty_program(
        folder,
        (name, right, wrong),
        "separable_bfloat16_sm80.cu",
        "separable_check",
        variant,
        SOURCES,
    )
    check_noticed(program, (1, 80, 0), says)
