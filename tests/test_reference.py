# SPDX-License-Identifier: BSD-3-Clause
"""The reference against loops that follow the definition, and against its own formula."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from aspp_ext import reference


def integers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


def by_definition(x: Tensor, weight: Tensor, rate: tuple[int, int]) -> Tensor:
    """y[n,o,i,j] = sum over c,u,v of w[o,c,u,v] x[n, c, i + (u - kh/2) rh, j + (v - kw/2) rw]."""
    n, _, height, width = x.shape
    out, _, kh, kw = weight.shape
    y = x.new_zeros(n, out, height, width)
    for i, j, u, v in itertools.product(range(height), range(width), range(kh), range(kw)):
        row, column = i + (u - kh // 2) * rate[0], j + (v - kw // 2) * rate[1]
        if 0 <= row < height and 0 <= column < width:
            y[:, :, i, j] += x[:, :, row, column] @ weight[:, :, u, v].T
    return y


KERNELS = [(1, 1), (3, 3), (5, 5), (3, 1), (1, 5)]
RATES = [1, 2, 4, 9, (1, 3), (6, 2)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rate", RATES)
def test_one_branch_is_the_definition(kernel: tuple[int, int], rate: int | tuple[int, int]) -> None:
    x, weight = integers(2, 3, 5, 7), integers(4, 3, *kernel, seed=1)
    pair = rate if isinstance(rate, tuple) else (rate, rate)
    assert torch.equal(
        reference.atrous_pyramid(x, [weight], [rate]), by_definition(x, weight, pair)
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rate", RATES)
def test_depthwise_is_a_diagonal_dense_kernel(kernel, rate) -> None:
    x, depthwise = integers(2, 3, 5, 7), integers(3, 1, *kernel, seed=1)
    pointwise = integers(4, 3, 1, 1, seed=2)
    dense = torch.einsum("oc,cuv->ocuv", pointwise[:, :, 0, 0], depthwise[:, 0])
    assert torch.equal(
        reference.atrous_separable_conv2d(x, depthwise, pointwise, rate),
        reference.atrous_pyramid(x, [dense], [rate]),
    )


def test_one_dimension_is_a_row() -> None:
    x, weights = integers(2, 3, 11), [integers(4, 3, 1, seed=1), integers(2, 3, 5, seed=2)]
    rows = reference.atrous_pyramid(x[:, :, None], [w[:, :, None] for w in weights], [1, 3])
    assert torch.equal(reference.atrous_pyramid(x, weights, [1, 3]), rows[:, :, 0])
    assert torch.equal(reference.atrous_pyramid(x, weights, [1, (7, 3)]), rows[:, :, 0])
    depthwise, pointwise = integers(3, 1, 3, seed=3), integers(4, 3, 1, seed=4)
    rows = reference.atrous_separable_conv2d(
        x[:, :, None], depthwise[:, :, None], pointwise[:, :, None], 2
    )
    y = reference.atrous_separable_conv2d(x, depthwise, pointwise, 2)
    assert torch.equal(y, rows[:, :, 0])


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_epilogue(per_sample: bool, activation: str | None) -> None:
    x, weights = integers(2, 3, 4, 5), [integers(2, 3, 1, 1, seed=1), integers(3, 3, 3, 3, seed=2)]
    bias, scale = integers(5, seed=3), integers(5, seed=4)
    shift = integers(2, 5, seed=5) if per_sample else integers(5, seed=5)
    conv = torch.cat([by_definition(x, w, (2, 2)) for w in weights], 1)
    expected = torch.empty_like(conv)
    for n, o in itertools.product(range(2), range(5)):
        s = shift[n, o] if per_sample else shift[o]
        expected[n, o] = (conv[n, o] + bias[o]) * scale[o] + s
    if activation == "relu":
        expected = expected.clamp(min=0)
    y = reference.atrous_pyramid(
        x, weights, [2, 2], bias=bias, scale=scale, shift=shift, activation=activation
    )
    assert torch.equal(y, expected)


@pytest.mark.parametrize("between_activation", [None, "relu"])
def test_between_touches_only_the_branches_that_have_it(between_activation: str | None) -> None:
    x, depthwise = integers(2, 3, 4, 5), integers(3, 1, 3, 3, seed=1)
    pointwise = [integers(2, 3, 1, 1, seed=seed) for seed in (2, 3, 4)]
    scale, shift = integers(3, seed=5), integers(3, seed=6)
    y = reference.atrous_separable_pyramid(
        x,
        [depthwise, None, depthwise],
        pointwise,
        [2, 1, 1],
        between=[(scale, shift), None, None],
        between_activation=between_activation,
    )
    dense = torch.diag_embed(depthwise[:, 0].permute(1, 2, 0)).permute(2, 3, 0, 1)
    middle = by_definition(x, dense, (2, 2)) * scale[:, None, None] + shift[:, None, None]
    if between_activation == "relu":
        middle = middle.clamp(min=0)
    expected = [
        by_definition(middle, pointwise[0], (1, 1)),
        by_definition(x, pointwise[1], (1, 1)),
        by_definition(by_definition(x, dense, (1, 1)), pointwise[2], (1, 1)),
    ]
    assert torch.equal(y, torch.cat(expected, 1))


@pytest.mark.parametrize("activations", [("relu", "relu"), (None, "relu"), ("relu", None)])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("separable", [False, True])
def test_aspp_inference_is_its_formula(pooled, separable, per_sample, activations) -> None:
    x = integers(2, 4, 4, 2)  # 8 pixels: the mean of integers is exact
    depthwise = [None, integers(4, 1, 3, 3, seed=1) if separable else None]
    kernel = 1 if separable else 3
    weights = [integers(2, 4, 1, 1, seed=2), integers(3, 4, kernel, kernel, seed=3)]
    shift, project_shift = integers(5, seed=4), integers(2, 3, seed=5)
    project_shift = project_shift if per_sample else project_shift[0]
    inner, outer = ((lambda t: t.clamp(min=0)) if a else (lambda t: t) for a in activations)
    pool_weight = integers(2, 4, seed=6) if pooled else None
    pool_shift = integers(2, seed=7) if pooled else None
    project_weight = integers(3, 7 if pooled else 5, seed=8)
    y = reference.aspp_inference(
        x,
        depthwise,
        weights,
        [1, 2],
        shift,
        pool_weight,
        pool_shift,
        project_weight,
        project_shift,
        activation=activations[0],
        project_activation=activations[1],
    )
    if separable:
        maps = reference.atrous_separable_pyramid(x, depthwise, weights, [1, 2], shift=shift)
    else:
        maps = reference.atrous_pyramid(x, weights, [1, 2], shift=shift)
    expected = torch.einsum("pk,nkhw->nphw", project_weight[:, :5], inner(maps))
    if pooled:
        vector = inner(x.mean((2, 3)) @ pool_weight.T + pool_shift)
        expected += (vector @ project_weight[:, 5:].T)[:, :, None, None]
    assert torch.equal(y, outer(expected + project_shift[..., None, None]))
    if not pooled:
        branches = (x, depthwise, weights, [1, 2], shift, None, None, None, None)
        y = reference.aspp_inference(*branches, activation=activations[0])
        assert torch.equal(y, inner(maps))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_is_exact_on_small_integers(dtype: torch.dtype) -> None:
    x, weights = integers(1, 2, 5, 5), [integers(2, 2, 1, 1, seed=1), integers(2, 2, 3, 3, seed=2)]
    low = reference.atrous_pyramid(x.to(dtype), [w.to(dtype) for w in weights], [1, 2])
    assert low.dtype == dtype
    assert torch.equal(low.double(), reference.atrous_pyramid(x, weights, [1, 2]))


def test_empty_batch() -> None:
    y = reference.atrous_pyramid(integers(0, 3, 4, 4), [integers(2, 3, 3, 3)], [2])
    assert y.shape == (0, 2, 4, 4)


def test_second_derivatives() -> None:
    x = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    dense = torch.randn(2, 2, 3, 1, dtype=torch.float64, requires_grad=True)
    depthwise = torch.randn(2, 1, 1, 3, dtype=torch.float64, requires_grad=True)
    pointwise = torch.randn(2, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)

    def pyramid(x: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
        return reference.atrous_pyramid(x, [weight], [1], shift=shift)

    def separable(x: Tensor, depthwise: Tensor, pointwise: Tensor) -> Tensor:
        return reference.atrous_separable_conv2d(x, depthwise, pointwise, 2)

    assert torch.autograd.gradgradcheck(pyramid, (x, dense, shift))
    assert torch.autograd.gradgradcheck(separable, (x, depthwise, pointwise))
