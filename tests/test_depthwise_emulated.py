# SPDX-License-Identifier: BSD-3-Clause
"""The depthwise kernels themselves, run on the CPU: exact, without a race or an access out of
bounds.

The second half tests these tests: a fault planted in the kernels' sources must be noticed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import emulated
import pytest

KERNEL_FILES = ("combine", "between_grad", "depthwise", "depthwise_grad_input")
KERNEL_FILES += ("depthwise_grad_weight", "depthwise_parts")
SOURCES = tuple(f"csrc/cuda/kernels/{name}_sm80.cu" for name in KERNEL_FILES)
KERNELS = {"forward": 0, "between_grad": 1, "grad_weight": 2, "grad_input": 3}
MATHS = {"bfloat16": 0, "float16": 1, "tf32": 2, "float32": 3, "float64": 4}
PROBLEMS = {"plain": 150, "address": 20, "thread": 8}
RACE = "WARNING: ThreadSanitizer: data race"
OUTSIDE = "heap-buffer-overflow"


@pytest.fixture(scope="module")
def programs() -> dict[str, Path]:
    return emulated.build("depthwise_check", list(emulated.VARIANTS), *SOURCES)


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("variant", emulated.VARIANTS)
def test_random_problems_are_exact(programs, variant, name, math) -> None:
    arguments = (str(PROBLEMS[variant]), str(KERNELS[name]), str(MATHS[math]))
    ran = emulated.run(programs[variant], "1", *arguments, ASPP_EMULATE_SEED="7")
    assert ran.returncode == 0, ran.stdout + ran.stderr[-5000:]


def test_order_of_blocks_and_threads_does_not_matter(programs) -> None:
    for seed in range(1, 6):
        variables = {"ASPP_EMULATE_SEED": str(seed), "ASPP_EMULATE_THREADS": str(1 + seed % 2)}
        ran = emulated.run(programs["plain"], "300", "40", **variables)
        assert ran.returncode == 0, ran.stdout + ran.stderr[-5000:]


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
def sources(tmp_path_factory) -> Path:
    """A copy of csrc to plant faults in."""
    root = tmp_path_factory.mktemp("faults")
    shutil.copytree(emulated.ROOT / "csrc", root / "csrc")
    return root


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_noticed(programs, sources, fault) -> None:
    name, right, wrong, (of_file, of_kernel), variant, expected = FAULTS[fault]
    kernels = sources / "csrc/cuda/kernels"
    text = (emulated.ROOT / "csrc/cuda/kernels" / name).read_text()
    assert text.count(right) == 1, "the line to plant the fault in has changed"
    (kernels / name).write_text(text.replace(right, wrong))
    # Only the faulty kernel is compiled, in place of the right one.
    kernel = kernels / f"{of_file}_sm80.cu"
    objects = emulated.objects("depthwise_check", variant, *SOURCES)
    objects = [path for path in objects if path.name != kernel.name + ".o"]
    flags = emulated.flags(variant, sources / "csrc")
    program = sources / fault
    command = [*flags, "-x", "c++", kernel, "-x", "none", *objects, "-o", program]
    ran = subprocess.run(command, cwd=sources, capture_output=True, text=True)
    (kernels / name).write_text(text)
    assert ran.returncode == 0, ran.stderr

    for seed in ("1", "2"):  # of the order in which threads run
        arguments = ("1", "60", str(of_kernel), "0")
        ran = emulated.run(program, *arguments, ASPP_EMULATE_SEED=seed)
        if ran.returncode != 0:
            break
    assert ran.returncode != 0, "nothing was noticed"
    said = ran.stdout + ran.stderr
    assert re.search(expected or r"got \S+, expected", said), said[-5000:]
