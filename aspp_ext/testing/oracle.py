# SPDX-License-Identifier: BSD-3-Clause
"""The truth: :mod:`aspp_ext.reference` in float64, each convolution a sum of shifted products.

It shares no code with the kernels or their planner, nor with cuDNN or oneDNN, whose own faults
would otherwise pass for ours, or hide them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .operators import Op, converted, outputs


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """``F.conv2d`` of stride 1 whose result is as large as x ``[N, C, H, W]``, dense or depthwise.

    ``y[:, :, h, w] = sum_ij weight[:, :, i, j] @ x[:, :, h + i r - p, w + j r - p]``
    """
    c, plane = x.size(1), x.shape[2:]
    if stride != 1 or groups not in (1, c):
        raise ValueError(f"the oracle is of stride 1 and 1 or {c} groups, got {stride}, {groups}")
    total: Tensor | None = None
    for i in range(weight.size(2)):
        for j in range(weight.size(3)):
            shifts = [t * r - p for t, r, p in zip((i, j), dilation, padding, strict=True)]
            if any(abs(shift) >= size for shift, size in zip(shifts, plane, strict=True)):
                continue
            (top, bottom), (left, right) = ((max(-s, 0), max(s, 0)) for s in shifts)
            height, width = plane[0] - top - bottom, plane[1] - left - right
            part = x[:, :, bottom : bottom + height, right : right + width]
            tap = weight[:, :, i, j]
            if groups == 1:
                product = torch.matmul(tap, part.flatten(2)).unflatten(2, (height, width))
            else:
                product = part * tap[:, :, None]
            product = F.pad(product, (left, right, top, bottom))
            total = product if total is None else total + product
    if total is None:  # no tap is live: an even kernel
        raise ValueError(f"the oracle needs an odd kernel, got {tuple(weight.shape)}")
    return total if bias is None else total + bias[:, None, None]


class ShiftedProducts(TorchFunctionMode):
    """Inside, ``F.conv2d`` is :func:`convolution`; its gradients are those of what that is made of.

    Raises:
        NotImplementedError: another convolution is called.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d:
            return convolution(*args, **(kwargs or {}))
        if "conv" in getattr(func, "__name__", ""):
            raise NotImplementedError(f"the oracle has no {func.__name__}")
        return func(*args, **(kwargs or {}))


def oracle_of(op: Op, arguments: Any) -> list[Tensor]:
    """What an operator has to return, in float64 and on the device of its arguments."""
    with ShiftedProducts():
        return outputs(op.expected(*converted(arguments, torch.float64)))
