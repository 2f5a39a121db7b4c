# SPDX-License-Identifier: BSD-3-Clause
"""Batch norms folded into the weights before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aspp_ext.ops.formats import pointwise_as_channels_last

from .head import Head, Norm


class Folded(NamedTuple):
    """The arguments of ``aspp_inference`` after x."""

    depthwise_weights: list[Tensor | None]
    weights: list[Tensor]
    atrous_rates: list[tuple[int, int]]
    shift: Tensor
    pool_weight: Tensor
    pool_shift: Tensor
    project_weight: Tensor
    project_shift: Tensor


def fold(head: Head, dtype: torch.dtype) -> Folded:
    """Fold every norm: ``norm(conv(x)) = (scale * W) x + shift``, ``scale = g / sqrt(var + eps)``.

    Computed in float32 (float64 for double) and rounded to ``dtype`` once. The norms must have
    running statistics.
    """
    depthwise = [
        None if b.depthwise is None else b.depthwise.weight.to(dtype) for b in head.branches
    ]
    folded = [_fold_one(b.conv, b.norm) for b in head.branches]
    weights = [_as_read(w.to(dtype)) for w, _ in folded]
    shift = torch.cat([s for _, s in folded]).to(dtype)
    pool_weight, pool_shift = _fold_one(head.pool, head.pool_norm)
    project_weight, project_shift = _fold_one(head.project, head.project_norm)
    return Folded(
        depthwise,
        weights,
        [b.rate for b in head.branches],
        shift,
        _as_read(pool_weight.flatten(1).to(dtype)),
        pool_shift.to(dtype),
        _as_read(project_weight.flatten(1).to(dtype)),
        project_shift.to(dtype),
    )


def in_range(head: Head, folded: Folded) -> bool:
    """Whether the folded weights are as good as their factors, which multiply the pixels one after
    the other: finite, and with so many digits left in their dtype that rows of subnormal numbers
    add less than other roundings do, if the features are as the norms' statistics say."""
    convs = [*(b.conv for b in head.branches), head.pool]
    norms = [*(b.norm for b in head.branches), head.pool_norm]
    columns = torch.linalg.vector_norm(head.project.weight.flatten(1), dim=0, dtype=torch.double)
    shifts = torch.cat([folded.shift, folded.pool_shift, folded.project_shift])
    info = torch.finfo(folded.project_weight.dtype)
    good = _have_digits(convs, norms, columns, info)
    last = _have_digits([head.project], [head.project_norm], torch.ones_like(columns[:1]), info)
    return bool(good & last & shifts.isfinite().all())


def _have_digits(
    convs: Sequence[nn.Conv2d], norms: Sequence[Norm], columns: Tensor, info: torch.finfo
) -> Tensor:
    """Of the rows of all these, read by the next convolution's ``columns``."""
    largest = [torch.linalg.vector_norm(c.weight.flatten(1), torch.inf, 1) for c in convs]
    weight = torch.cat(largest).double()
    scale = torch.cat([_scale(n, torch.double).abs() for n in norms])
    product = weight * scale
    # The part of a row that roundings of subnormal numbers are; of a zero in a factor, none.
    lost = (info.tiny * info.eps / product).clamp(max=1)
    lost = torch.where((weight == 0) | (scale == 0), 0, lost)
    shares = torch.cat([_deviation(n) for n in norms]) * columns
    noise, limit = (lost * shares).norm(), info.eps / 4 * shares.norm()
    return (product <= info.max).all() & (noise <= limit)


def _deviation(norm: Norm) -> Tensor:
    """[O], of a norm's results from their mean, where the ReLU leaves them."""
    assert norm.running_var is not None
    var = norm.running_var.double()
    gamma = torch.ones_like(var) if norm.weight is None else norm.weight.double().abs()
    beta = torch.zeros_like(var) if norm.bias is None else norm.bias.double()
    gamma = gamma * (var / (var + norm.eps)).sqrt()
    return torch.where(gamma > 0, gamma * torch.special.ndtr(beta / gamma).sqrt(), 0)


def _scale(norm: Norm, wide: torch.dtype) -> Tensor:
    assert norm.running_var is not None
    scale = (norm.running_var.to(wide) + norm.eps).rsqrt()
    return scale if norm.weight is None else scale * norm.weight.to(wide)


def _fold_one(conv: nn.Conv2d, norm: Norm) -> tuple[Tensor, Tensor]:
    weight, mean = conv.weight, norm.running_mean
    assert mean is not None
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    scale = _scale(norm, wide)
    shift = -mean.to(wide)
    if conv.bias is not None:
        shift = shift + conv.bias.to(wide)
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.to(wide)
    return weight.to(wide) * scale[:, None, None, None], shift


def _as_read(weight: Tensor) -> Tensor:
    """[O, K] or [O, C, kh, kw] as the device's kernels read it in place.

    The CPU's want stride 1 over O; the CUDA kernels, and cuDNN's, stride 1 over C.
    """
    if weight.device.type == "cuda":
        last = torch.channels_last if weight.dim() == 4 else torch.contiguous_format
        return pointwise_as_channels_last(weight.contiguous(memory_format=last))
    inner = (*range(2, weight.dim()), 1, 0)
    order = [inner.index(d) for d in range(weight.dim())]
    return weight.permute(inner).contiguous().permute(order)
