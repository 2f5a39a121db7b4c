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
    c, (height, width) = x.size(1), x.shape[2:]
    if stride != 1 or groups not in (1, c):
        raise ValueError(f"the oracle is of stride 1 and 1 or {c} groups, got {stride}, {groups}")
    shifts = (
        [(t, t * dilation[axis] - padding[axis]) for t in range(weight.size(2 + axis))]
        for axis in (0, 1)
    )
    rows = [(i, dy) for i, dy in next(shifts) if abs(dy) < height]
    columns = [(j, dx) for j, dx in next(shifts) if abs(dx) < width]
    top, left = max(abs(dy) for _, dy in rows), max(abs(dx) for _, dx in columns)
    around = F.pad(x, (left, left, top, top))
    live = [
        around[:, :, top + dy : top + dy + height, left + dx : left + dx + width]
        for _, dy in rows
        for _, dx in columns
    ]
    taps = weight[:, :, [i for i, _ in rows]][..., [j for j, _ in columns]].flatten(2)
    if groups == 1:
        of_weight = taps.transpose(1, 2).flatten(1)  # [O, taps * C]
        product = torch.matmul(of_weight, torch.cat(live, 1).flatten(2))
        product = product.unflatten(2, (height, width))
    else:
        product = (torch.stack(live, 2) * taps.transpose(0, 1).unflatten(2, (-1, 1, 1))).sum(2)
    return product if bias is None else product + bias[:, None, None]


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
