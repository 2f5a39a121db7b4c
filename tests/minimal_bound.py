# SPDX-License-Identifier: BSD-3-Clause
"""The CPU's minimal filtering in float64, from its tables: the form of a branch, and how large the
numbers on the way to its results are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aspp_ext import _plan
from aspp_ext.testing import Branch, Problem


class Axis(NamedTuple):
    """A: [products, 3], B: [products, size], C: [size, products]; C before the division."""

    taps: Tensor
    inputs: Tensor
    outputs: Tensor
    denominator: int


def axis_of(size: int, kernel: int, rate: int, kinds: dict[str, bool]) -> Axis:
    plan = _plan.minimal_axis(size, kernel, rate, **kinds)
    taps = torch.tensor([plan.weights[p.weight] for p in plan.products], dtype=torch.float64)
    inputs, outputs = (torch.zeros(len(taps), size, dtype=torch.float64) for _ in range(2))
    for k, product in enumerate(plan.products):
        for lines, terms in ((inputs, product.inputs), (outputs, product.outputs)):
            for at, coefficient in terms:
                lines[k, at] = coefficient
    return Axis(taps, inputs, outputs.T, plan.denominator)


def choice_of(problem: Problem, index: int = 0, prepared: bool = False) -> _plan.PolyphaseChoice:
    """What the CPU's operators choose for a branch, alone as they do."""
    n, c, h, w = problem.shape
    b = problem.branches[index]
    alone = _plan.Problem(
        1 if prepared else n, h, w, [_plan.Branch(b.kernel, b.rate, b.out_channels)], c
    )
    return _plan.choose_polyphase(alone, 0, prepared=prepared)


def chosen(problem: Problem) -> list[int]:
    """The branches that are filtered minimally by default."""
    return [b for b in range(len(problem.branches)) if choice_of(problem, b).is_polyphase]


def problem_of(x: Tensor, weight: Tensor, rate: tuple[int, int]) -> Problem:
    out_channels, _, *kernel = weight.shape
    return Problem("", tuple(x.shape), (Branch(out_channels, tuple(kernel), rate),))


def axes_of(x: Tensor, weight: Tensor, rate: tuple[int, int]) -> tuple[Axis, Axis]:
    """In the cheapest form, which ``ASPP_EXT_POLYPHASE=always`` takes."""
    form = choice_of(problem_of(x, weight, rate)).form
    assert form is not None
    sizes = zip(x.shape[2:], weight.shape[2:], rate, (form.rows, form.columns), strict=True)
    rows, columns = (axis_of(*size) for size in sizes)
    return rows, columns


def filtered(x: Tensor, weight: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """What the form computes, before it is divided: [N, O, H, W]."""
    o, c, *kernel = weight.shape
    taps = weight.new_zeros(o, c, 3, 3)
    live = [slice(None) if k == 3 else slice(1, 2) for k in kernel]
    taps[:, :, live[0], live[1]] = weight
    combined = rows.inputs @ x @ columns.inputs.T
    matrices = rows.taps @ taps @ columns.taps.T
    products = torch.einsum("ncpq,ocpq->nopq", combined, matrices)
    return rows.outputs @ products @ columns.outputs.T


def absolute(axis: Axis) -> Axis:
    return Axis(axis.taps.abs(), axis.inputs.abs(), axis.outputs.abs(), axis.denominator)


def magnitude(x: Tensor, weight: Tensor, rate: tuple[int, int], divided: bool = True) -> Tensor:
    """|C| ((|A| |w|) * (|B| |x|)) of one branch in float64."""
    rows, columns = map(absolute, axes_of(x, weight, rate))
    sums = filtered(x.double().abs(), weight.double().abs(), rows, columns)
    return sums / (rows.denominator * columns.denominator) if divided else sums


def grad_weight_magnitude(grad: Tensor, x: Tensor, axes: tuple[Axis, Axis]) -> Tensor:
    """|A'| ((|C'| |grad|) * (|B| |x|)), with the transposes of A and C; before it is divided."""
    rows, columns = map(absolute, axes)
    of_x = rows.inputs @ x.double().abs() @ columns.inputs.T
    of_grad = rows.outputs.T @ grad.double().abs() @ columns.outputs
    products = torch.einsum("ncpq,nopq->ocpq", of_x, of_grad)
    return rows.taps.T @ products @ columns.taps


def parts_of_one(axis: Axis) -> int:
    """Of which the taps' coefficients are multiples."""
    return next(
        n for n in (1, 2, 4, 8, 16, 32) if torch.equal((n * axis.taps).frac(), 0 * axis.taps)
    )


def assert_sums_are_exact(
    x: Tensor, weight: Tensor, rate: tuple[int, int], grad: Tensor | None = None
) -> None:
    """Of integers: every number on the way fits into float32, in the unit of the combined taps;
    with ``grad`` on the way to both gradients, else to the outputs.

    Results' magnitudes bound every partial sum before them, for no coefficient of an input or an
    output is below 1.
    """
    axes = axes_of(x, weight, rate)
    if grad is None:
        sums = [magnitude(x, weight, rate, divided=False)]
    else:
        mirrored = weight.transpose(0, 1).flip(2, 3)
        sums = [magnitude(grad, mirrored, rate, divided=False)]
        sums.append(grad_weight_magnitude(grad, x, axes))
    largest = max(s.max().item() for s in sums) * parts_of_one(axes[0]) * parts_of_one(axes[1])
    assert largest <= 2**24, f"sums up to {largest:.0f} units are not exact in float32"
