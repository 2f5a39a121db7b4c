# SPDX-License-Identifier: BSD-3-Clause
"""What minimal filtering rounds: the error law where it is chosen, and a bound that always holds.

A form adds and subtracts neighbours before it multiplies, so that a small output beside large
inputs has their error. In each axis the sum of the paths to an output is at most ``GROWTH`` times
max|w| max|x| instead of 3, so that per branch

    |error| <= gamma * GROWTH**2 * C * max|w| * max|x|,   gamma ~ (C + 30) * eps / 2

over the pixels, rates apart, that an output's sequences join. Directly it is 9 (9 C) for both
factors. On values of one size the errors are as large as PyTorch's.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from minimal_bound import axis_of, choice_of, chosen, error_bound, magnitude, problem_of
from table import check_error_law, dtype_id, is_gradient
from torch import Tensor

import aspp_ext
from aspp_ext import reference
from aspp_ext.testing import OPS, PROBLEMS, Branch, Problem

GROWTH = 34 / 3
DENSE = [name for name in OPS if name.startswith("pyramid") or name == "head"]


def aspp(name: str, shape: tuple[int, int, int, int], out_channels: int, *rates: int) -> Problem:
    atrous = [Branch(out_channels, (3, 3), (rate, rate)) for rate in rates]
    return Problem(name, shape, (Branch(out_channels, (1, 1)), *atrous))


REALISTIC = [
    aspp("output_stride_16", (2, 96, 33, 33), 64, 6, 12, 18),
    aspp("crops", (6, 64, 17, 17), 72, 3, 6, 9),
    aspp("wide_map", (1, 64, 24, 48), 80, 4, 8),
]


@pytest.mark.parametrize("problem", REALISTIC, ids=lambda p: p.name)
@pytest.mark.parametrize("name", DENSE)
def test_error_law_where_it_is_chosen(name, problem) -> None:
    assert chosen(problem)
    check_error_law(OPS[name].native, OPS[name], problem, torch.float32, "cpu")
