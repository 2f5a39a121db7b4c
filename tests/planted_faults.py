# SPDX-License-Identifier: BSD-3-Clause
"""Runs of programs like ``tests/emulation/pyramid_check.cpp``, right ones and faulty ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import programs
import pytest
from kernel_faults import FAULTS

MATHS = {"bfloat16": 0, "float16": 1, "tf32": 2, "float32": 3, "float64": 4}
plain_is_quick = pytest.mark.quick(when=lambda variant: variant == "plain")
"""AddressSanitizer and ThreadSanitizer look on in ``make prove``."""
each_variant = pytest.mark.parametrize("variant", programs.VARIANTS)


def each_fault(name: str) -> Callable[..., None]:
    """Parametrises ``fault`` by those of a program."""
    faults = FAULTS[name]
    quick = pytest.mark.quick(when=lambda fault: faults[fault].quick)
    return lambda test: quick(pytest.mark.parametrize("fault", faults)(test))


def check_passes(program: Path, *arguments: object, **variables: str) -> None:
    ran = programs.run(program, *arguments, **variables)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-5000:]


def check_orders(program: Path, problems: int) -> None:
    """The order of blocks and threads does not matter."""
    for seed in range(1, 6):
        variables = {"ASPP_EMULATE_SEED": str(seed), "ASPP_EMULATE_THREADS": str(1 + seed % 2)}
        check_passes(program, 300, problems, **variables)


def check_noticed(name: str, fault: str) -> None:
    """Runs it in a few orders of threads, until it fails: for the reason that it should."""
    planted = FAULTS[name][fault]
    program = programs.ready(name, planted.variant, fault)
    for seed in ("1", "2", "3"):
        ran = programs.run(program, 1, *planted.arguments, ASPP_EMULATE_SEED=seed)
        if ran.returncode != 0:
            break
    assert ran.returncode != 0, "nothing was noticed"
    said = ran.stdout + ran.stderr
    assert re.search(planted.says, said), said[-5000:]
