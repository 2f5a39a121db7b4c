# SPDX-License-Identifier: BSD-3-Clause
"""Every operator on every problem: exact on integers, within the error law on random values."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

import aspp_ext
from aspp_ext import reference
from aspp_ext.testing import (
    DTYPES,
    OPS,
    PROBLEMS,
    assert_no_worse_than_torch,
    converted,
    laid_out,
    outputs,
)

LOW = (torch.bfloat16, torch.float16)
BACKENDS = [None, "cpu", "reference"]
CASES = [
    pytest.param(op, problem, id=f"{op_name}-{name}")
    for (op_name, op), (name, problem) in itertools.product(OPS.items(), PROBLEMS.items())
]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)


@each_dtype
@pytest.mark.parametrize(("op", "problem"), [c for c in CASES if c.values[0].exact(c.values[1])])
def test_integers_are_exact(op, problem, dtype) -> None:
    arguments = op.make(problem, dtype, integer=True)
    expected = [t.to(dtype) for t in outputs(op.expected(*converted(arguments, torch.float64)))]
    for name, call in op.implementations().items():
        if name == "reference" and dtype != torch.float32:
            continue  # in a low precision PyTorch rounds between its operators
        got = outputs(call(*arguments))
        assert len(got) == len(expected)
        for i, (g, e) in enumerate(zip(got, expected, strict=True)):
            assert g.dtype == dtype
            assert torch.equal(g, e), f"{name}: output {i} differs at {(g != e).nonzero()[:5]}"


def is_representative(problem) -> bool:
    """Enough outputs for statistics; other strides have been tested on integers.

    PyTorch, the yardstick, divides by zero at rates near 2**31 in low precision.
    """
    n, _, h, w = problem.shape
    plain = problem.layout == problem.weight_layout == "contiguous"
    return plain and max(problem.rates) < 2**20 and n * h * w * problem.out_channels >= 500


def is_gradient(op) -> bool:
    return "grad" in op.name or "backward" in op.name


def baseline_of(op, arguments, oracle: list[torch.Tensor]) -> list[torch.Tensor]:
    """PyTorch's own results: of its two memory formats the one that is further off.

    They are different kernels, whose errors differ up to fivefold in either direction. PyTorch's
    gradient of a channels_last depthwise weight in bfloat16 reads out of bounds, so not that one.
    """
    contiguous = outputs(op.expected(*arguments))
    low = arguments[0].dtype != torch.float32
    if low and op.name == "atrous_separable_pyramid_backward":
        return contiguous
    last = tree_map_only(torch.Tensor, lambda t: laid_out(t, "channels_last"), arguments)
    both = zip(contiguous, outputs(op.expected(*last)), oracle, strict=True)
    return [max(a, b, key=lambda t, e=e: worst(t, e)) for a, b, e in both]


def worst(t: torch.Tensor, exact: torch.Tensor) -> float:
    return (t.double() - exact).abs().max().item() if t.numel() else 0.0


def draws_for(op, dtype) -> int:
    """The gradients of small weights are few numbers, so that several draws are judged together."""
    if not is_gradient(op):
        return 1
    return 20 if dtype == torch.float32 else 5


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("op", "problem"), [c for c in CASES if is_representative(c.values[1])])
def test_error_law(op, problem, dtype) -> None:
    draws = []
    for draw in range(draws_for(op, dtype)):
        arguments = op.make(problem, dtype, draw=draw)
        oracle = outputs(op.expected(*converted(arguments, torch.float64)))
        ours = outputs(op.native(*arguments))
        draws.append(list(zip(ours, baseline_of(op, arguments, oracle), oracle, strict=True)))
    for same_output in zip(*draws, strict=True):
        got, base, exact = (
            torch.cat([t.flatten() for t in of]) for of in zip(*same_output, strict=True)
        )
        assert_no_worse_than_torch(got, base, exact, factor=3 if is_gradient(op) else 2)


@pytest.mark.parametrize(("op", "problem"), [c for c in CASES if is_representative(c.values[1])])
def test_float64(op, problem) -> None:
    arguments = op.make(problem, torch.float64)
    got, expected = outputs(op.native(*arguments)), outputs(op.expected(*arguments))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


SEEN = ["prime_sizes", "rate_above_the_map", "row_windows", "kernel_5x5", "outputs_not_of_16"]
OURS = [name for name in OPS if not name.startswith("pyramid_grad")]


def nan_and_seen(op, problem, dtype, leaf: int):
    """Which results are NaN, and which depend on the one element that was made NaN."""
    ones = tree_map_only(torch.Tensor, torch.ones_like, op.make(problem, dtype))
    leaves, spec = tree_flatten(ones)
    changed = leaves[leaf].clone()

    def with_element(value: float) -> tuple:
        changed.flatten()[2 * changed.numel() // 3] = value
        return tree_unflatten([*leaves[:leaf], changed, *leaves[leaf + 1 :]], spec)

    before, after = (
        outputs(op.expected(*converted(with_element(v), torch.float64))) for v in (1.0, 2.0)
    )
    got = outputs(op.native(*with_element(torch.nan)))
    return [g.isnan() for g in got], [b != a for b, a in zip(before, after, strict=True)]


def leaf_count(op, problem) -> list[int]:
    leaves = tree_flatten(op.make(problem, torch.float32))[0]
    return [i for i, t in enumerate(leaves) if isinstance(t, torch.Tensor) and t.numel() > 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize("op_name", OURS)
def test_nan_reaches_exactly_what_sees_it(op_name, name, dtype) -> None:
    """One NaN in one argument: the outputs that depend on that element are NaN, no others."""
    op, problem = OPS[op_name], PROBLEMS[name]
    for leaf in leaf_count(op, problem):
        for nan, seen in zip(*nan_and_seen(op, problem, dtype, leaf), strict=True):
            assert torch.equal(nan, seen), f"argument {leaf}"


@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize("op_name", ["pyramid_grad_input", "pyramid_grad_weight"])
def test_nan_reaches_every_gradient_that_sees_it(op_name, name) -> None:
    """oneDNN multiplies the zero padding, so that a NaN may reach more gradients than it has to."""
    op, problem = OPS[op_name], PROBLEMS[name]
    for leaf in leaf_count(op, problem):
        for nan, seen in zip(*nan_and_seen(op, problem, torch.float32, leaf), strict=True):
            assert nan[seen].all(), f"argument {leaf}"


def test_infinity_is_kept() -> None:
    x = torch.randn(1, 5, 7, 9)
    x[0, 2, 3, 4], x[0, 1, 6, 0] = torch.inf, -torch.inf
    weights = [torch.randn(20, 5, 3, 3), torch.randn(3, 5, 1, 1)]
    got = aspp_ext.atrous_pyramid(x, weights, [2, 1])
    expected = reference.atrous_pyramid(x, weights, [2, 1])
    assert torch.equal(got.isposinf(), expected.isposinf())
    assert torch.equal(got.isneginf(), expected.isneginf())
    assert torch.equal(got.isnan(), expected.isnan())


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-2, 3, shape).float()


@each_backend
@pytest.mark.parametrize("separable", [False, True], ids=["pyramid", "separable"])
@pytest.mark.parametrize(
    "given", list(itertools.product([0, 1], [0, 1], [None, "one", "per_sample"], [None, "relu"]))
)
def test_epilogue(separable, given, backend) -> None:
    bias, scale, shift, activation = given
    keywords = {
        "bias": integers(8) if bias else None,
        "scale": integers(8) if scale else None,
        "shift": {None: None, "one": integers(8), "per_sample": integers(3, 8)}[shift],
        "activation": activation,
    }
    x, rates = integers(3, 6, 5, 7), [2, (1, 3)]
    dense = [integers(5, 6, 3, 3), integers(3, 6, 1, 3)]
    depthwise, pointwise = (
        [integers(6, 1, 3, 3), None],
        [integers(5, 6, 1, 1), integers(3, 6, 1, 1)],
    )
    name = "atrous_separable_pyramid" if separable else "atrous_pyramid"
    weights = (depthwise, pointwise) if separable else (dense,)
    got = getattr(aspp_ext, name)(x, *weights, rates, **keywords, backend=backend)
    assert torch.equal(got, getattr(reference, name)(x, *weights, rates, **keywords))


@each_backend
@pytest.mark.parametrize("activation", [None, "relu"])
def test_between(activation, backend) -> None:
    x, rates = integers(2, 6, 5, 7), [2, 1, 3]
    depthwise = [integers(6, 1, 3, 3), None, integers(6, 1, 1, 3)]
    pointwise = [integers(o, 6, 1, 1) for o in (5, 3, 2)]
    between = [(integers(6), integers(6)), None, None]
    keywords = {"between": between, "between_activation": activation, "bias": integers(10)}
    got = aspp_ext.atrous_separable_pyramid(
        x, depthwise, pointwise, rates, **keywords, backend=backend
    )
    expected = reference.atrous_separable_pyramid(x, depthwise, pointwise, rates, **keywords)
    assert torch.equal(got, expected)
    one = {"between": between[0], "between_activation": activation, "activation": "relu"}
    first = (depthwise[0], pointwise[0], rates[0])
    got = aspp_ext.atrous_separable_conv2d(x, *first, **one, backend=backend)
    assert torch.equal(got, reference.atrous_separable_conv2d(x, *first, **one))


@each_backend
def test_one_dimension(backend) -> None:
    x, weights = integers(2, 6, 29), [integers(5, 6, 3), integers(4, 6, 1), integers(3, 6, 5)]
    keywords = {"shift": integers(2, 12), "activation": "relu"}
    got = aspp_ext.atrous_pyramid(x, weights, [4, 1, (9, 20)], **keywords, backend=backend)
    assert torch.equal(got, reference.atrous_pyramid(x, weights, [4, 1, (9, 20)], **keywords))


@each_backend
@pytest.mark.parametrize("pool", [True, False], ids=["pool", "no_pool"])
def test_head(pool, backend) -> None:
    x, rates = integers(2, 6, 4, 8), [1, 2, 3]
    arguments = (
        *(x, [None, integers(6, 1, 3, 3), None]),
        *([integers(5, 6, 1, 1), integers(4, 6, 1, 1), integers(3, 6, 3, 3)], rates, integers(12)),
        *((integers(7, 6), integers(7)) if pool else (None, None)),
        *(integers(9, 19 if pool else 12), integers(9)),
    )
    got = aspp_ext.aspp_inference(*arguments, backend=backend)
    assert torch.equal(got, reference.aspp_inference(*arguments))


SHAPES = [(2, 16, 6, 7), (1, 16, 6, 7), (2, 16, 1, 1), (1, 1, 5, 6), (2, 16, 1, 7), (2, 1, 1, 6)]
LAYOUTS = ["contiguous", "channels_last", "sliced", "transposed", "expanded_batch"]


@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last", "outputs_last"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_memory_format_is_that_of_convolution(shape, layout, weight_layout) -> None:
    x = laid_out(torch.randn(shape), layout)
    for kernel in (1, 3):
        weight = laid_out(torch.randn(8, shape[1], kernel, kernel), weight_layout)
        expected = F.conv2d(x, weight, padding=2 * (kernel // 2), dilation=2)
        got = aspp_ext.atrous_pyramid(x, [weight], [2])
        assert got.stride() == expected.stride()
    depthwise, pointwise = torch.randn(shape[1], 1, 3, 3), torch.randn(8, shape[1], 1, 1)
    pointwise = laid_out(pointwise, weight_layout)
    got = aspp_ext.atrous_separable_conv2d(x, depthwise, pointwise, 2)
    assert got.stride() == F.conv2d(x, pointwise).stride()


def test_arguments_are_not_written() -> None:
    for op in OPS.values():
        arguments = op.make(PROBLEMS["x_sliced"], torch.float32)
        before = tree_map_only(torch.Tensor, torch.clone, arguments)
        op.native(*arguments)
        for got, expected in zip(outputs_of(arguments), outputs_of(before), strict=True):
            assert torch.equal(got, expected)


def outputs_of(arguments) -> list[torch.Tensor]:
    return [t for t in tree_flatten(arguments)[0] if isinstance(t, torch.Tensor)]


def test_samples_do_not_depend_on_the_batch() -> None:
    """A sample's bits are the same alone and among others."""
    for op in (OPS["pyramid"], OPS["separable_between_epilogue"], OPS["head"]):
        x, *rest = op.make(PROBLEMS["prime_sizes"], torch.float32)
        whole = op.native(x, *rest)
        alone = [op.native(sample[None], *rest) for sample in x]
        assert torch.equal(whole, torch.cat(alone))
