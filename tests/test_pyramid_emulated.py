# SPDX-License-Identifier: BSD-3-Clause
"""The pyramid kernels themselves, run on the CPU: exact, without a race or an access out of bounds.

The second half tests these tests: a fault planted in the kernels' sources must be noticed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import emulated
import pytest

SOURCES = ("csrc/plan/*.cpp", "csrc/cuda/kernels/*.cu")
PASSES = {"forward": 0, "grad_input": 1, "grad_weight": 2}
MATHS = {"bfloat16": 0, "float16": 1, "tf32": 2, "float32": 3, "float64": 4}
PROBLEMS = {"plain": 150, "address": 20, "thread": 12}
RACE = "WARNING: ThreadSanitizer: data race"


@pytest.fixture(scope="module")
def programs() -> dict[str, Path]:
    return emulated.build("pyramid_check", list(emulated.VARIANTS), *SOURCES)


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("variant", emulated.VARIANTS)
def test_random_problems_are_exact(programs, variant, name, math) -> None:
    arguments = (str(PROBLEMS[variant]), str(PASSES[name]), str(MATHS[math]))
    ran = emulated.run(programs[variant], "1", *arguments, ASPP_EMULATE_SEED="7")
    assert ran.returncode == 0, ran.stdout + ran.stderr[-5000:]


def test_order_of_blocks_and_threads_does_not_matter(programs) -> None:
    for seed in range(1, 6):
        variables = {"ASPP_EMULATE_SEED": str(seed), "ASPP_EMULATE_THREADS": str(1 + seed % 2)}
        ran = emulated.run(programs["plain"], "300", "40", **variables)
        assert ran.returncode == 0, ran.stdout + ran.stderr[-5000:]


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
def sources(tmp_path_factory) -> Path:
    """A copy of csrc to plant faults in."""
    root = tmp_path_factory.mktemp("faults")
    shutil.copytree(emulated.ROOT / "csrc", root / "csrc")
    return root


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_noticed(programs, sources, fault) -> None:
    name, right, wrong, of_pass, variant, expected = FAULTS[fault]
    kernels = sources / "csrc/cuda/kernels"
    text = (emulated.ROOT / "csrc/cuda/kernels" / name).read_text()
    assert text.count(right) == 1, "the line to plant the fault in has changed"
    (kernels / name).write_text(text.replace(right, wrong))
    # Only the faulty kernels are compiled, and linked before the right ones.
    kernel = kernels / "pyramid_bfloat16_sm80.cu"
    objects = emulated.objects("pyramid_check", variant, *SOURCES)
    objects = [path for path in objects if path.name != kernel.name + ".o"]
    flags = emulated.flags(variant, sources / "csrc")
    program = sources / fault
    command = [*flags, "-x", "c++", kernel, "-x", "none", *objects, "-o", program]
    ran = subprocess.run(command, cwd=sources, capture_output=True, text=True)
    (kernels / name).write_text(text)
    assert ran.returncode == 0, ran.stderr

    for seed in ("1", "2"):  # of the order in which threads run
        arguments = ("1", "60", str(PASSES[of_pass]), "0")
        ran = emulated.run(program, *arguments, ASPP_EMULATE_SEED=seed)
        if ran.returncode != 0:
            break
    assert ran.returncode != 0, "nothing was noticed"
    said = ran.stdout + ran.stderr
    assert re.search(expected or r"got \S+, expected", said), said[-5000:]
