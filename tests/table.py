# SPDX-License-Identifier: BSD-3-Clause
"""The table ``OPS`` x ``PROBLEMS`` as checks that a device's implementations have to pass."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import marks_of, on_native
from selection import KERNELS
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

import aspp_ext
from aspp_ext import _triton
from aspp_ext.ops.family import NATIVE, TRITON
from aspp_ext.testing import (
    DTYPES,
    OPS,
    PROBLEMS,
    Branch,
    Op,
    Problem,
    assert_no_worse_than_torch,
    converted,
    laid_out,
    outputs,
)

LOW = (torch.bfloat16, torch.float16)
PYRAMIDS = ("pyramid", "pyramid_epilogue", "pyramid_grad_input", "pyramid_grad_weight")
SEPARABLE = tuple(name for name in OPS if name.startswith("separable"))

EMULATED = KERNELS == "emulated"
"""Whether the CPU's pyramids are the CUDA kernels, run by csrc/cuda/emulation."""

FILTERED = os.environ.get("ASPP_EXT_POLYPHASE") == "always"
"""Whether minimal filtering is forced."""

INTERPRETED = KERNELS == "interpreted"
"""Whether Triton's operators are tested, and no others, run by its interpreter."""
FAMILY = TRITON if INTERPRETED else NATIVE
"""The operators that are tested."""
WIDEST = torch.float32 if INTERPRETED else torch.float64
"""The most exact dtype that they compute in."""
BACKENDS = ["triton"] if INTERPRETED else [None, "cpu", "reference"]


CASES = [
    pytest.param(op, problem, id=f"{op_name}-{name}", marks=marks_of(op_name))
    for (op_name, op), (name, problem) in itertools.product(OPS.items(), PROBLEMS.items())
]


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Inputs and weights in whose memory formats PyTorch's rule for the result's has to be followed.
FORMAT_SHAPES = (
    *((2, 16, 6, 7), (1, 16, 6, 7), (2, 16, 1, 1)),
    *((1, 1, 5, 6), (2, 16, 1, 7), (2, 1, 1, 6)),
)
FORMATS = ("contiguous", "channels_last", "sliced", "transposed", "expanded_batch")
WEIGHT_FORMATS = ("contiguous", "channels_last", "outputs_last")


def has_dtype(implementation: str, dtype: torch.dtype) -> bool:
    """Whether it computes in that dtype: of DTYPES, only Triton's kernels lack one, float64."""
    return implementation != "triton" or dtype in _triton.DTYPES


_JOINT = Problem(
    "joint", (1, 20, 5, 7), (Branch(12, (5, 5)), Branch(20, (1, 1)), Branch(12, (3, 3), (2, 3)))
)
_PIXELS = Problem("pixels", (1, 20, 19, 23), (Branch(40, (1, 1)), Branch(12, (1, 3), (2, 3))))
_CHANNELS = Problem("channels", (1, 520, 4, 4), (Branch(12, (3, 3), (2, 3)), Branch(20, (1, 1))))
CUT = {
    **dict.fromkeys(("pyramid", "pyramid_epilogue", "pyramid_grad_input"), _JOINT),
    "pyramid_grad_weight": _PIXELS,
    **dict.fromkeys(("separable", "separable_between_epilogue"), _CHANNELS),
    **dict.fromkeys(("separable_backward", "separable_backward_between"), _JOINT),
}
"""Of each operator a problem with sums that are cut into slices on the interpreter's device."""


def implementations(op: Op) -> dict[str, Callable[..., Any]]:
    """What computes it on the CPU, as far as it is tested in this process."""
    found = op.implementations()
    return {"triton": found["triton"]} if INTERPRETED else found


def call_of(op: Op) -> Callable[..., Any]:
    """The operator; of the head, which Triton has none for, what composes it."""
    return implementations(op)["triton"] if INTERPRETED else op.native


EACH = [d if has_dtype("triton", d) else pytest.param(d, marks=on_native) for d in DTYPES]
each_dtype = pytest.mark.parametrize("dtype", EACH, ids=dtype_id)


def oracle_of(op: Op, arguments: Any) -> list[torch.Tensor]:
    """The reference's results in float64, on the CPU."""
    return outputs(op.expected(*converted(arguments, torch.float64, "cpu")))


def check_integers(call: Callable[..., Any], op: Op, arguments: Any, name: str = "") -> None:
    """Bit for bit the oracle, rounded once."""
    dtype = arguments[0].dtype
    expected = [t.to(dtype) for t in oracle_of(op, arguments)]
    got = outputs(call(*arguments))
    assert len(got) == len(expected)
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        assert (g.dtype, g.device) == (dtype, arguments[0].device)
        g = g.cpu()
        assert torch.equal(g, e), f"{name}: output {i} differs at {(g != e).nonzero()[:5]}"


def is_representative(problem: Problem) -> bool:
    """Enough outputs for statistics; other strides have been tested on integers.

    PyTorch, the yardstick, divides by zero at rates near 2**31 in low precision.
    """
    n, _, h, w = problem.shape
    plain = problem.layout == problem.weight_layout == "contiguous"
    return plain and max(problem.rates) < 2**20 and n * h * w * problem.out_channels >= 500


def is_gradient(op: Op) -> bool:
    return "grad" in op.name or "backward" in op.name


def worst(t: torch.Tensor, exact: torch.Tensor) -> float:
    return (t.double() - exact).abs().max().item() if t.numel() else 0.0


def baseline_of(op: Op, arguments: Any, oracle: list[torch.Tensor]) -> list[torch.Tensor]:
    """PyTorch's own results: of its two memory formats the one that is further off.

    They are different kernels, whose errors differ up to fivefold in either direction. In bfloat16
    PyTorch's gradient of a channels_last weight reads out of bounds on the CPU, depthwise or where
    the channels are no multiple of 16, so not that one.
    """
    contiguous = [t.cpu() for t in outputs(op.expected(*arguments))]
    low = arguments[0].dtype != torch.float32
    if low and op.name in ("atrous_separable_pyramid_backward", "atrous_pyramid_grad_weight"):
        return contiguous
    last = tree_map_only(torch.Tensor, lambda t: laid_out(t, "channels_last"), arguments)
    other = [t.cpu() for t in outputs(op.expected(*last))]
    both = zip(contiguous, other, oracle, strict=True)
    return [max(a, b, key=lambda t, e=e: worst(t, e)) for a, b, e in both]


def factor_for(op: Op, dtype: torch.dtype) -> float:
    """PyTorch's sums are blocked on the CPU; a CUDA core adds one product after the other.

    Minimal filtering subtracts sums to get a weight's gradient. Over few pixels, where it is not
    chosen, PyTorch's have no errors that would hide that.
    """
    sequential = EMULATED and dtype == torch.float32
    forced = FILTERED and op.name == "atrous_pyramid_grad_weight"
    return (3 if is_gradient(op) else 2) * (2 if sequential or forced else 1)


def draws_for(op: Op, dtype: torch.dtype) -> int:
    """The gradients of small weights are few numbers, so that several draws are judged together."""
    if not is_gradient(op):
        return 1
    if INTERPRETED:
        return 3
    return 20 if dtype == torch.float32 else 5


def check_error_law(
    call: Callable[..., Any],
    op: Op,
    problem: Problem,
    dtype: torch.dtype,
    device: str,
    rounded: Callable[[Any], Any] = lambda arguments: arguments,
) -> None:
    """At most twice as far from the oracle as PyTorch on the same device, plus one rounding.

    ``rounded`` arguments are what PyTorch gets, where its products are of a lower precision.
    """
    draws = []
    for draw in range(draws_for(op, dtype)):
        arguments = op.make(problem, dtype, draw=draw, device=device)
        oracle = oracle_of(op, arguments)
        ours = [t.cpu() for t in outputs(call(*arguments))]
        base = baseline_of(op, rounded(arguments), oracle)
        draws.append(list(zip(ours, base, oracle, strict=True)))
    for same_output in zip(*draws, strict=True):
        got, base, exact = (
            torch.cat([t.flatten() for t in of]) for of in zip(*same_output, strict=True)
        )
        assert_no_worse_than_torch(got, base, exact, factor=factor_for(op, dtype))


def check_float64(call: Callable[..., Any], op: Op, problem: Problem, device: str) -> None:
    arguments = op.make(problem, torch.float64, device=device)
    got = [t.cpu() for t in outputs(call(*arguments))]
    torch.testing.assert_close(got, oracle_of(op, arguments), rtol=1e-12, atol=1e-12)


SEEN = ["prime_sizes", "rate_above_the_map", "row_windows", "kernel_5x5", "outputs_not_of_16"]


def tensors_in(arguments: Any) -> list[int]:
    """Which of the leaves are tensors with elements."""
    leaves = tree_flatten(arguments)[0]
    return [i for i, t in enumerate(leaves) if isinstance(t, torch.Tensor) and t.numel() > 0]


def check_nan(
    call: Callable[..., Any],
    op: Op,
    problem: Problem,
    dtype: torch.dtype,
    device: str,
    merged: bool = False,
) -> None:
    """One NaN in one argument: the outputs that depend on that element are NaN, no others.

    ``merged``: a kernel may compute rectangles with different taps as one, in which dead taps
    multiply zeros. A NaN among the weights then reaches more of its channel, as it does in PyTorch.
    """
    made = op.make(problem, dtype, device=device)
    for leaf in tensors_in(made):
        weight = merged and 1 <= leaf <= 2 * len(problem.branches)  # depthwise, and dense or 1x1
        for nan, seen in nan_and_seen(call, op, made, leaf):
            most = seen.any(3, True).any(2, True).any(0, True) if weight else seen
            assert nan[seen].all(), f"argument {leaf}: not all that depends on it is NaN"
            assert not (nan & ~most).any(), f"argument {leaf}: more than depends on it is NaN"


def nan_and_seen(
    call: Callable[..., Any], op: Op, made: Any, leaf: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each result: what is NaN, and what depends on the one element that was made NaN."""
    leaves, spec = tree_flatten(tree_map_only(torch.Tensor, torch.ones_like, made))
    changed = leaves[leaf].clone()

    def with_element(value: float) -> Any:
        changed.flatten()[2 * changed.numel() // 3] = value
        return tree_unflatten([*leaves[:leaf], changed, *leaves[leaf + 1 :]], spec)

    before, after = (oracle_of(op, with_element(v)) for v in (1.0, 2.0))
    nan = [t.isnan().cpu() for t in outputs(call(*with_element(torch.nan)))]
    return [(n, b != a) for n, b, a in zip(nan, before, after, strict=True)]


def each_format(test: Callable[..., None]) -> Callable[..., None]:
    """Parametrises shape, layout and weight_layout."""
    test = pytest.mark.parametrize("shape", FORMAT_SHAPES, ids=lambda s: "x".join(map(str, s)))(
        test
    )
    test = pytest.mark.parametrize("layout", FORMATS)(test)
    return pytest.mark.parametrize("weight_layout", WEIGHT_FORMATS)(test)


def check_memory_format(
    shape: tuple[int, ...], layout: str, weight_layout: str, device: str, backend: str | None
) -> None:
    """The strides of the CPU's convolution: cuDNN's own choice depends on the processor."""
    x = laid_out(torch.randn(shape), layout)
    for kernel in (1, 3):
        weight = laid_out(torch.randn(8, shape[1], kernel, kernel), weight_layout)
        expected = F.conv2d(x, weight, padding=2 * (kernel // 2), dilation=2)
        there = [laid_out(t.to(device), k) for t, k in ((x, layout), (weight, weight_layout))]
        got = aspp_ext.atrous_pyramid(there[0], [there[1]], [2], backend=backend)
        assert got.stride() == expected.stride()
