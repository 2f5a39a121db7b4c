# SPDX-License-Identifier: BSD-3-Clause
"""The fused separable kernel, run on the CPU: exact, without a race or an access out of bounds.

The second half tests these tests: a fault planted in the kernel's sources must be noticed.
"""

from __future__ import annotations

import programs
import pytest
from planted_faults import (
    MATHS,
    check_noticed,
    check_orders,
    check_passes,
    each_fault,
    each_variant,
    plain_is_quick,
)

FUSED = ("bfloat16", "float16", "tf32", "float32")
PROBLEMS = {"plain": 300, "address": 40, "thread": 20}


@plain_is_quick
@pytest.mark.parametrize("math", FUSED)
@each_variant
def test_random_problems_are_exact(variant, math) -> None:
    arguments = (PROBLEMS[variant], MATHS[math])
    program = programs.ready("separable_check", variant)
    check_passes(program, 1, *arguments, ASPP_EMULATE_SEED="7")


def test_order_of_blocks_and_threads_does_not_matter() -> None:
    check_orders(programs.ready("separable_check"), 60)


@each_fault("separable_check")
def test_planted_fault_is_noticed(fault) -> None:
    check_noticed("separable_check", fault)
