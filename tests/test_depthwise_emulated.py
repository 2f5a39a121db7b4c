# SPDX-License-Identifier: BSD-3-Clause
"""The depthwise kernels themselves, run on the CPU: exact, without a race or an access out of
bounds.

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

KERNELS = {"forward": 0, "between_grad": 1, "grad_weight": 2, "grad_input": 3}
PROBLEMS = {"plain": 150, "address": 20, "thread": 8}


@plain_is_quick
@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("name", KERNELS)
@each_variant
def test_random_problems_are_exact(variant, name, math) -> None:
    arguments = (PROBLEMS[variant], KERNELS[name], MATHS[math])
    program = programs.ready("depthwise_check", variant)
    check_passes(program, 1, *arguments, ASPP_EMULATE_SEED="7")


def test_order_of_blocks_and_threads_does_not_matter() -> None:
    check_orders(programs.ready("depthwise_check"), 40)


@each_fault("depthwise_check")
def test_planted_fault_is_noticed(fault) -> None:
    check_noticed("depthwise_check", fault)
