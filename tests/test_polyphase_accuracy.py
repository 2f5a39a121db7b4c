# SPDX-License-Identifier: BSD-3-Clause
"""What minimal filtering rounds on values of one size: the error law where it is chosen.

A form adds and subtracts neighbours before it multiplies. In each axis the sum of the paths to an
output is at most ``GROWTH`` times max|w| max|x| instead of 3. Errors are at most about twice those
of the direct computation; test_loose.py has the values that are of many sizes.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from minimal_bound import (
    axis_of,
    choice_of,
    chosen,
    problem_of,
)
from table import check_error_law

import aspp_ext
from aspp_ext import reference
from aspp_ext.testing import OPS, PROBLEMS, Branch, Problem

pytestmark = pytest.mark.settings("isa", "threads")

GROWTH = 34 / 3
DENSE = [name for name in OPS if name.startswith("pyramid")]
DENSE += ["head", "head_no_projection", "head_linear"]


def aspp(name: str, shape: tuple[int, int, int, int], out_channels: int, *rates: int) -> Problem:
    atrous = [Branch(out_channels, (3, 3), (rate, rate)) for rate in rates]
    return Problem(name, shape, (Branch(out_channels, (1, 1)), *atrous))


REALISTIC = [
    aspp("output_stride_16", (2, 128, 33, 33), 64, 6, 12, 18),
    aspp("crops", (8, 80, 17, 17), 72, 3, 6, 9),
    aspp("wide_map", (1, 64, 24, 48), 80, 4, 8),
]


@pytest.mark.parametrize("problem", REALISTIC, ids=lambda p: p.name)
@pytest.mark.parametrize("name", DENSE)
def test_error_law_where_it_is_chosen(name, problem) -> None:
    assert chosen(problem)
    check_error_law(OPS[name].native, OPS[name], problem, torch.float32, "cpu")


def test_the_table_has_what_is_filtered_by_default() -> None:
    assert [name for name, problem in PROBLEMS.items() if chosen(problem)] == ["many_triples"]


# --- Values of one size

SHAPES = {
    "singles and pairs": ((2, 8, 20, 20), 6, (11, 11)),
    "triples": ((4, 40, 9, 9), 33, (3, 3)),
    "blocks of channels": ((1, 130, 12, 15), 20, (5, 5)),
    "overlapped": ((1, 8, 24, 20), 70, (4, 3)),
    "everything": ((2, 64, 33, 29), 16, (6, 7)),
    "one channel": ((1, 1, 40, 40), 1, (1, 6)),
}


def test_shapes_have_what_they_are_called() -> None:
    for name, (shape, out_channels, rate) in SHAPES.items():
        weight = torch.empty(out_channels, shape[1], 3, 3)
        form = choice_of(problem_of(torch.empty(shape), weight, rate)).form
        kinds = {k for side in (form.rows, form.columns) for k, on in side.items() if on}
        named = {k for k in ("pair", "triple", "overlapped") if k in name}
        assert named <= kinds, f"{name}: {kinds}"


def test_growth() -> None:
    """No set of blocks has longer sums of paths, on values of one size."""
    largest = 0.0
    for length in range(1, 25):
        for kinds in itertools.product([False, True], repeat=3):
            named = dict(zip(("pair", "triple", "overlapped"), kinds, strict=True))
            axis = axis_of(length, 3, 1, named)
            of_products = axis.taps.abs().sum(1) * axis.inputs.abs().sum(1)
            sums = axis.outputs.abs() @ of_products / axis.denominator
            largest = max(largest, sums.max().item())
    assert largest == pytest.approx(GROWTH)


@pytest.mark.parametrize("name", SHAPES)
def test_on_values_of_one_size_it_is_about_as_good_as_the_direct_computation(
    name, monkeypatch
) -> None:
    monkeypatch.setenv("ASPP_EXT_POLYPHASE", "always")
    shape, out_channels, rate = SHAPES[name]
    squares = torch.zeros(2, dtype=torch.float64)
    for _ in range(3):
        x, weight = torch.randn(shape), torch.randn(out_channels, shape[1], 3, 3)
        exact = reference.atrous_pyramid(x.double(), [weight.double()], [rate])
        for i, polyphase in enumerate((True, False)):
            got = aspp_ext.atrous_pyramid(x, [weight], [rate], polyphase=polyphase)
            squares[i] += (got - exact).square().mean()
    assert squares[0].sqrt() < 2.5 * squares[1].sqrt()
