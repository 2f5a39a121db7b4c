# SPDX-License-Identifier: BSD-3-Clause
"""What minimal filtering rounds: the error law where it is chosen, and a bound that always holds.

A form adds and subtracts neighbours before it multiplies, so that a small output beside large
inputs has their error. In each axis the sum of the paths to an output is at most ``GROWTH`` times
max|w| max|x| instead of 3, so that per branch

    |error| <= gamma * GROWTH**2 * C * max|w| * max|x|,   gamma = sqrt(C + 30) * eps

over the pixels that an output's sequences join; directly it is 9 for GROWTH**2 and 9 C for C + 30.
On values of one size errors are at most about twice those of the direct computation. Where pixels
a rate apart differ much, those of the small ones are relative to the large ones.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from minimal_bound import (
    axis_of,
    choice_of,
    chosen,
    error_bound,
    grad_input_bound,
    grad_weight_bound,
    problem_of,
)
from table import check_error_law
from torch import Tensor

import aspp_ext
from aspp_ext import reference
from aspp_ext.testing import OPS, PROBLEMS, Branch, Problem

pytestmark = pytest.mark.settings("isa", "threads")

GROWTH = 34 / 3
DENSE = [name for name in OPS if name.startswith("pyramid") or name == "head"]


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


# --- The bound

SHAPES = {
    "singles and pairs": ((2, 8, 20, 20), 6, (11, 11)),
    "triples": ((4, 40, 9, 9), 33, (3, 3)),
    "blocks of channels": ((1, 130, 12, 15), 20, (5, 5)),
    "overlapped": ((1, 8, 24, 20), 70, (4, 3)),
    "everything": ((2, 64, 33, 29), 16, (6, 7)),
    "one channel": ((1, 1, 40, 40), 1, (1, 6)),
}


def alternating(*shape: int, ratio: float, steps: tuple[int, ...]) -> Tensor:
    """1 and ``ratio`` in turn, along the last axes each so many places at a time."""
    index = torch.zeros(shape, dtype=torch.long)
    for axis, step in enumerate(reversed(steps), 1):
        place = torch.arange(shape[-axis]) // step
        index += place.reshape(-1, *[1] * (axis - 1))
    return ratio ** (index % 2).double()


def scaled(kind: str, ratio: float, shape, out_channels: int, rate) -> tuple[Tensor, Tensor]:
    """Values that are so unequal from pixel to pixel of a sequence, tap to tap or by channel."""
    x, weight = torch.randn(shape), torch.randn(out_channels, shape[1], 3, 3)
    if kind in ("pixels", "both"):
        x *= alternating(*shape, ratio=ratio, steps=rate)
    if kind in ("taps", "both"):
        weight *= alternating(*weight.shape, ratio=ratio, steps=(1, 1))
    if kind == "channels":
        x *= alternating(shape[1], ratio=ratio, steps=(1,))[:, None, None]
    return x, weight


def errors_and_bounds(x: Tensor, weight: Tensor, rate) -> list[tuple[Tensor, Tensor]]:
    """Of the result and of both gradients."""
    grad = torch.randn(x.size(0), weight.size(0), *x.shape[2:])

    def results(atrous_pyramid, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        y = atrous_pyramid(leaves[0], [leaves[1]], [rate])
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))]

    got = results(aspp_ext.atrous_pyramid, torch.float32)
    exact = results(reference.atrous_pyramid, torch.float64)
    bounds = (
        error_bound(x, weight, rate),
        grad_input_bound(grad, weight, rate),
        grad_weight_bound(grad, x, weight, rate),
    )
    return [((g - e).abs(), b) for g, e, b in zip(got, exact, bounds, strict=True)]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("ratio", [1, 1e4, 1e8], ids="{:g}".format)
@pytest.mark.parametrize("kind", ["pixels", "taps", "channels", "both"])
def test_error_is_bounded(kind, ratio, name, monkeypatch) -> None:
    """Output by output, however unequal neighbours are; a thousand times the error is too much."""
    monkeypatch.setenv("ASPP_EXT_POLYPHASE", "always")
    x, weight = scaled(kind, ratio, *SHAPES[name])
    shares = [(e / b).max().item() for e, b in errors_and_bounds(x, weight, SHAPES[name][2])]
    assert max(shares) <= 1
    assert shares[0] > 1e-3


def test_shapes_have_what_they_are_called() -> None:
    for name, (shape, out_channels, rate) in SHAPES.items():
        weight = torch.empty(out_channels, shape[1], 3, 3)
        form = choice_of(problem_of(torch.empty(shape), weight, rate)).form
        kinds = {k for side in (form.rows, form.columns) for k, on in side.items() if on}
        named = {k for k in ("pair", "triple", "overlapped") if k in name}
        assert named <= kinds, f"{name}: {kinds}"


@pytest.mark.parametrize("ratio", [1e4, 1e8], ids="{:g}".format)
def test_errors_beside_large_pixels_are_relative_to_these(ratio, monkeypatch) -> None:
    """What is lost: directly an output that sees small pixels alone has their precision."""
    monkeypatch.setenv("ASPP_EXT_POLYPHASE", "always")
    x, weight = torch.rand(1, 16, 9, 9), torch.rand(8, 16, 3, 3)
    x[..., :3, :3] *= ratio
    exact = reference.atrous_pyramid(x.double(), [weight.double()], [3])
    for polyphase, least, most in ((True, 1e-9 * ratio, 1e-5 * ratio), (False, 0, 1e-6)):
        got = aspp_ext.atrous_pyramid(x, [weight], [3], polyphase=polyphase)
        assert least < ((got - exact) / exact)[..., 6:, 6:].abs().max() < most


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
        x, weight = scaled("", 1, shape, out_channels, rate)
        exact = reference.atrous_pyramid(x.double(), [weight.double()], [rate])
        for i, polyphase in enumerate((True, False)):
            got = aspp_ext.atrous_pyramid(x, [weight], [rate], polyphase=polyphase)
            squares[i] += (got - exact).square().mean()
    assert squares[0].sqrt() < 2.5 * squares[1].sqrt()
