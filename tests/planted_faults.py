# SPDX-License-Identifier: BSD-3-Clause
"""Runs of programs like ``tests/emulation/pyramid_check.cpp``, and faults planted in kernels."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import emulated

MATHS = {"bfloat16": 0, "float16": 1, "tf32": 2, "float32": 3, "float64": 4}
RACE = "WARNING: ThreadSanitizer: data race"
OUTSIDE = "heap-buffer-overflow"
WRONG = r"got \S+, expected"
"""What such a program says of wrong bits."""


def check_passes(program: Path, *arguments: object, **variables: str) -> None:
    ran = emulated.run(program, *map(str, arguments), **variables)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-5000:]


def check_orders(program: Path, problems: int) -> None:
    """The order of blocks and threads does not matter."""
    for seed in range(1, 6):
        variables = {"ASPP_EMULATE_SEED": str(seed), "ASPP_EMULATE_THREADS": str(1 + seed % 2)}
        check_passes(program, 300, problems, **variables)


def copy_sources(folder: Path) -> Path:
    """A copy of csrc in ``folder`` to plant faults in; returns the folder."""
    shutil.copytree(emulated.ROOT / "csrc", folder / "csrc")
    return folder


def faulty_program(
    folder: Path, fault: tuple[str, str, str], kernel: str, program: str, variant: str,
    sources: tuple[str, ...],
) -> Path:  # fmt: skip
    """The program of ``emulated.build(program, [variant], *sources)`` with a fault in a kernel.

    Args:
        fault: a file of csrc/cuda/kernels, what to replace in it, by what.
        kernel: the only file that is compiled with the fault, in place of the right one.
    """
    name, right, wrong = fault
    kernels = folder / "csrc/cuda/kernels"
    text = (emulated.ROOT / "csrc/cuda/kernels" / name).read_text()
    assert text.count(right) == 1, "the line to plant the fault in has changed"
    (kernels / name).write_text(text.replace(right, wrong))
    objects = emulated.objects(program, variant, *sources)
    objects = [path for path in objects if path.name != f"{kernel}.o"]
    flags = emulated.flags(variant, folder / "csrc")
    faulty = folder / "faulty"
    command = [*flags, "-x", "c++", kernels / kernel, "-x", "none", *objects, "-o", faulty]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    (kernels / name).write_text(text)
    assert ran.returncode == 0, ran.stderr
    return faulty


def check_noticed(program: Path, arguments: tuple[object, ...], says: str | None) -> None:
    """Runs it in a few orders of threads, until it fails: for the reason ``says``, or WRONG."""
    for seed in ("1", "2", "3"):
        ran = emulated.run(program, *map(str, arguments), ASPP_EMULATE_SEED=seed)
        if ran.returncode != 0:
            break
    assert ran.returncode != 0, "nothing was noticed"
    said = ran.stdout + ran.stderr
    assert re.search(says or WRONG, said), said[-5000:]
