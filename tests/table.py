# SPDX-License-Identifier: BSD-3-Clause
"""The table ``OPS`` x ``PROBLEMS`` as checks that a device's implementations have to pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import marks_of, on_native
from selection import KERNELS

import aspp_ext
from aspp_ext import _triton
from aspp_ext.ops.family import NATIVE, TRITON
from aspp_ext.testing import DTYPES, OPS, PROBLEMS, Branch, Op, Problem, checks, laid_out
from aspp_ext.testing.checks import is_gradient

LOW = (torch.bfloat16, torch.float16)
PYRAMIDS = ("pyramid", "pyramid_epilogue", "pyramid_grad_input", "pyramid_grad_weight")
SEPARABLE = tuple(name for name in OPS if name.startswith("separable"))

EMULATED = KERNELS == "emulated"
"""Whether the CPU's pyramids are the CUDA kernels, run by csrc/cuda/emulation."""

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


def draws_for(op: Op, dtype: torch.dtype) -> int:
    """The gradients of small weights are few numbers, so that several draws are judged together."""
    if not is_gradient(op):
        return 1
    if INTERPRETED:
        return 3
    return 20 if dtype == torch.float32 else 5


def check_error_law(
    call: Callable[..., Any], op: Op, problem: Problem, dtype: torch.dtype, *rest: Any, **named: Any
) -> None:
    """With as many draws as it takes."""
    draws = draws_for(op, dtype)
    checks.check_error_law(call, op, problem, dtype, *rest, draws=draws, **named)


SEEN = ["prime_sizes", "rate_above_the_map", "row_windows", "kernel_5x5", "outputs_not_of_16"]


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
