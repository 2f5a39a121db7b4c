# SPDX-License-Identifier: BSD-3-Clause
"""The fused separable kernel, run on the CPU: exact, without a race or an access out of bounds.

The second half tests these tests: a fault planted in the kernel's sources must be noticed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import emulated
import pytest

SOURCES = ("csrc/plan/*.cpp", "csrc/cuda/kernels/separable*.cu")
MATHS = {"bfloat16": 0, "float16": 1, "tf32": 2, "float32": 3}
PROBLEMS = {"plain": 300, "address": 40, "thread": 20}
RACE = "WARNING: ThreadSanitizer: data race"


@pytest.fixture(scope="module")
def programs() -> dict[str, Path]:
    return emulated.build("separable_check", list(emulated.VARIANTS), *SOURCES)


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("variant", emulated.VARIANTS)
def test_random_problems_are_exact(programs, variant, math) -> None:
    arguments = (str(PROBLEMS[variant]), str(MATHS[math]))
    ran = emulated.run(programs[variant], "1", *arguments, ASPP_EMULATE_SEED="7")
    assert ran.returncode == 0, ran.stdout + ran.stderr[-5000:]


def test_order_of_blocks_and_threads_does_not_matter(programs) -> None:
    for seed in range(1, 6):
        variables = {"ASPP_EMULATE_SEED": str(seed), "ASPP_EMULATE_THREADS": str(1 + seed % 2)}
        ran = emulated.run(programs["plain"], "300", "60", **variables)
        assert ran.returncode == 0, ran.stdout + ran.stderr[-5000:]


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
def sources(tmp_path_factory) -> Path:
    """A copy of csrc to plant faults in."""
    root = tmp_path_factory.mktemp("faults")
    shutil.copytree(emulated.ROOT / "csrc", root / "csrc")
    return root


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_noticed(programs, sources, fault) -> None:
    name, right, wrong, variant, expected = FAULTS[fault]
    kernels = sources / "csrc/cuda/kernels"
    text = (emulated.ROOT / "csrc/cuda/kernels" / name).read_text()
    assert text.count(right) == 1, "the line to plant the fault in has changed"
    (kernels / name).write_text(text.replace(right, wrong))
    # Only the faulty kernel is compiled, and linked before the right ones.
    kernel = kernels / "separable_bfloat16_sm80.cu"
    objects = emulated.objects("separable_check", variant, *SOURCES)
    objects = [path for path in objects if path.name != kernel.name + ".o"]
    flags = emulated.flags(variant, sources / "csrc")
    program = sources / fault
    command = [*flags, "-x", "c++", kernel, "-x", "none", *objects, "-o", program]
    ran = subprocess.run(command, cwd=sources, capture_output=True, text=True)
    (kernels / name).write_text(text)
    assert ran.returncode == 0, ran.stderr

    for seed in ("1", "2", "3"):  # of the order in which threads run
        ran = emulated.run(program, "1", "80", "0", ASPP_EMULATE_SEED=seed)
        if ran.returncode != 0:
            break
    assert ran.returncode != 0, "nothing was noticed"
    said = ran.stdout + ran.stderr
    assert re.search(expected or r"got \S+, expected", said), said[-5000:]
