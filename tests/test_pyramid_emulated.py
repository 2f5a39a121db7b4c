# SPDX-License-Identifier: BSD-3-Clause
"""The pyramid kernels themselves, run on the CPU: exact, without a race or an access out of bounds.

The second half tests these tests: a fault planted in the kernels' sources must be noticed.
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

PASSES = {"forward": 0, "grad_input": 1, "grad_weight": 2}
PROBLEMS = {"plain": 150, "address": 20, "thread": 12}


@plain_is_quick
@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("name", PASSES)
@each_variant
def test_random_problems_are_exact(variant, name, math) -> None:
    arguments = (PROBLEMS[variant], PASSES[name], MATHS[math])
    program = programs.ready("pyramid_check", variant)
    check_passes(program, 1, *arguments, ASPP_EMULATE_SEED="7")


def test_order_of_blocks_and_threads_does_not_matter() -> None:
    check_orders(programs.ready("pyramid_check"), 40)


@each_fault("pyramid_check")
def test_planted_fault_is_noticed(fault) -> None:
    check_noticed("pyramid_check", fault)
