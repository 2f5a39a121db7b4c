# SPDX-License-Identifier: BSD-3-Clause
"""What ``atrous_separable_pyramid_batch_norm`` has to satisfy on a device with kernels for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from aspp_ext import reference
from aspp_ext.ops import separable_norm
from aspp_ext.ops.family import NATIVE
from aspp_ext.ops.separable_choice import separable_way
from aspp_ext.testing import (
    OPS,
    PROBLEMS,
    Problem,
    assert_no_worse_than_torch,
    laid_out,
    outputs,
)
from aspp_ext.testing.batch_norm import made, wide
from aspp_ext.testing.checks import assert_statistics, factor_for

SEPARABLE = OPS["separable"]
SHAPES = (
    *("aspp", "prime_sizes", "channels_not_of_8", "one_channel", "kernel_5x5", "one_column"),
    *("rate_above_the_map", "rates_per_axis", "x_channels_last", "x_sliced", "x_transposed"),
    *("weights_channels_last", "row_windows_batch", "steps_not_taken_16"),
    *("in_place_channel_slice", "in_place_row_slice", "in_place_column_slice"),
)
each_shape = pytest.mark.parametrize("name", SHAPES)
FILLED = [p for p in PROBLEMS.values() if p.shape[0] > 0]
each_filled = pytest.mark.parametrize("problem", FILLED, ids=lambda p: p.name)
each_store = pytest.mark.parametrize("store", [False, True], ids=["recomputed", "stored"])
PATHS = ("chosen", "slices", "stored")
each_path = pytest.mark.parametrize("path", PATHS)


def operator(step: str) -> Any:
    """ "statistics", or what follows "atrous_separable_norm"."""
    if step == "statistics":
        return NATIVE.op("atrous_depthwise_statistics")
    return NATIVE.op(f"atrous_separable_norm{step}")


def affine(problem: Problem, dtype: torch.dtype, device: str, integer: bool) -> list[Tensor]:
    """Scale and shift ``[branches * C]``, as the operators take them."""
    size = (2, len(problem.branches) * problem.shape[1])
    values = torch.Generator().manual_seed(1)
    drawn = torch.randn(size, generator=values)
    drawn = torch.randint(-2, 3, size, generator=values).float() if integer else drawn
    return list(drawn.to(device, wide(dtype)))


def depthwise_of(x: Tensor, weights: list[Tensor], rates: list[int]) -> list[Tensor]:
    """By PyTorch, of the branches that have weights."""
    found = []
    for b, d in enumerate(weights):
        if d.numel() == 0:
            continue
        rate = [min(r, s) for r, s in zip(rates[2 * b : 2 * b + 2], x.shape[2:], strict=True)]
        padding = [r * (k - 1) // 2 for r, k in zip(rate, d.shape[2:], strict=True)]
        found.append(F.conv2d(x, d, None, 1, padding, rate, x.size(1)))
    return found


def check_statistics(problem: Problem, dtype: torch.dtype, device: str) -> None:
    """Of the results as they are stored; the same bits where they are not."""
    x, depthwise, _, rates = SEPARABLE.make(problem, dtype, device=device)[:4]
    mean, squares, stored = operator("statistics")(x, depthwise, rates, True)
    assert all(e.is_contiguous(memory_format=torch.channels_last) for e in stored)
    alone = operator("statistics")(x, depthwise, rates)
    assert torch.equal(alone[0], mean)
    assert torch.equal(alone[1], squares)
    assert list(alone[2]) == []
    results = iter(stored)
    for d, m, s in zip(depthwise, mean.split(x.size(1)), squares.split(x.size(1)), strict=True):
        if d.numel():
            assert_statistics(next(results), m, s)
        else:
            assert not m.any()
            assert not s.any()
    assert next(results, None) is None


def check_stored_integers(problem: Problem, dtype: torch.dtype, device: str) -> None:
    x, depthwise, _, rates = SEPARABLE.make(problem, dtype, True, device=device)[:4]
    _, _, stored = operator("statistics")(x, depthwise, rates, True)
    expected = depthwise_of(x.cpu().double(), [d.cpu().double() for d in depthwise], rates)
    assert len(stored) == len(expected)
    for got, want in zip(stored, expected, strict=True):
        assert torch.equal(got.cpu(), want.to(dtype))


def forward(arguments: Any, affine: list[Tensor], path: str) -> Tensor:
    """``path``: one of PATHS; slices are of the batch, through memory."""
    x, depthwise, pointwise, rates = arguments
    with separable_way("stored" if path == "slices" else ""):
        stored = operator("statistics")(x, depthwise, rates, True)[2] if path == "stored" else []
        return operator("")(x, depthwise, pointwise, rates, *affine, True, stored)


def by_torch(arguments: Any, affine: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The forward from scale and shift in ``dtype``, what is between being rounded to it."""
    x, depthwise, pointwise = ([t.to(dtype) for t in outputs(a)] for a in arguments[:3])
    results = iter(depthwise_of(x[0], depthwise, arguments[3]))
    found = []
    for b, (d, p) in enumerate(zip(depthwise, pointwise, strict=True)):
        operand = x[0]
        if d.numel():
            own = slice(b * operand.size(1), (b + 1) * operand.size(1))
            scale, shift = (v[own, None, None].to(wide(dtype)) for v in affine)
            operand = (next(results).to(scale.dtype) * scale + shift).relu().to(dtype)
        found.append(F.conv2d(operand, p))
    return torch.cat(found, 1)


def check_integers(problem: Problem, dtype: torch.dtype, device: str, path: str) -> None:
    arguments = SEPARABLE.make(problem, dtype, True, device=device)[:4]
    vectors = affine(problem, dtype, device, True)
    got = forward(arguments, vectors, path)
    on_cpu = [[t.cpu() for t in outputs(a)] for a in arguments[:3]]
    expected = by_torch([*on_cpu, arguments[3]], [v.cpu() for v in vectors], torch.float64)
    assert torch.equal(got.cpu(), expected.to(dtype))


def check_error_law(problem: Problem, dtype: torch.dtype, device: str, path: str) -> None:
    arguments = SEPARABLE.make(problem, dtype, device=device)[:4]
    vectors = affine(problem, dtype, device, False)
    got, base, exact = (
        forward(arguments, vectors, path),
        by_torch(arguments, vectors, dtype),
        by_torch(arguments, vectors, torch.float64),
    )
    assert_no_worse_than_torch(got, base, exact, factor_for(SEPARABLE, dtype))


def check_against_torch(
    problem: Problem, dtype: torch.dtype, device: str, tolerance: float, **keywords: Any
) -> None:
    """y, statistics and every gradient, against PyTorch's operators in float64."""
    call = made(problem, dtype, device)
    shape = (problem.shape[0], problem.out_channels, *problem.shape[2:])
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    grad = laid_out(grad, problem.layout)
    got = call.gradients(grad, **keywords)
    exact = call.map(lambda t: t.double()).gradients(grad.double(), backend="reference", **keywords)
    assert [t.dtype for t in got] == [dtype, wide(dtype), wide(dtype), *[dtype] * len(call.leaves)]
    for i, (g, e) in enumerate(zip(got, exact, strict=True)):
        error, largest = (g.double() - e).abs().max(), e.abs().max()
        assert error <= tolerance * max(largest, 1e-3), f"{i}: {error:.3g} of {largest:.3g}"


def check_operators(name: str, dtype: torch.dtype, device: str) -> None:
    """Fakes and schemas of the four."""
    problem = PROBLEMS[name]
    x, depthwise, pointwise, rates = SEPARABLE.make(problem, dtype, device=device)[:4]
    vectors = affine(problem, dtype, device, False)
    grad = torch.randn_like(reference.atrous_pyramid(x, pointwise, [1] * len(pointwise)))
    common = (x, depthwise, pointwise, rates, *vectors, True)
    tests = {"test_utils": ["test_schema", "test_faketensor"]}
    for store in (False, True):
        opcheck(operator("statistics").default, (x, depthwise, rates, store), **tests)
        stored = operator("statistics")(x, depthwise, rates, store)[2]
        opcheck(operator("").default, (*common, list(stored)), **tests)
    opcheck(operator("_sums").default, (grad, *common), **tests)
    for needs in ((True, True, True), (False, True, False), (True, False, False)):
        opcheck(operator("_backward").default, (grad, *common, *vectors, *needs), **tests)


def choosing(patch: pytest.MonkeyPatch, store: bool) -> None:
    """From now on."""
    patch.setattr(separable_norm, "_stores", lambda *_: store)


def check_large_mean(dtype: torch.dtype, device: str) -> None:
    """Thirty times the deviation costs few digits more than it costs PyTorch."""
    call = made(PROBLEMS["one_branch"], dtype, device, norm=torch.float32)
    weight = call.depthwise[0]
    assert weight is not None
    weight.fill_(0.01)
    weight[:, :, 1, 1] = 1.0
    call.x = call.x + 30
    grad = torch.ones(1, 8, 6, 8, device=device, dtype=dtype)
    grad[:, :, ::2] = -0.5
    exact = call.map(lambda t: t.double()).gradients(grad.double(), backend="reference")
    base = call.gradients(grad, backend="reference")
    for i, (g, b, e) in enumerate(zip(call.gradients(grad), base, exact, strict=True)):
        error, theirs = ((t.double() - e).abs().max() for t in (g, b))
        rounding = torch.finfo(dtype).eps * e.abs().max()
        assert error <= 4 * theirs + 8 * rounding, f"{i}: {error:.3g}, PyTorch's {theirs:.3g}"
