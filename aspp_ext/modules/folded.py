# SPDX-License-Identifier: BSD-3-Clause
"""Batch norms folded into the weights before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aspp_ext.ops.formats import pointwise_as_channels_last

from .head import Branch, Conv, Head, columns, has_between, lead
from .joint_norm import Norm

Affine = tuple[Tensor, Tensor]


class Folded(NamedTuple):
    """The weights of a head whose norms are in them, as the operators take them."""

    depthwise_weights: list[Tensor | None]
    between: list[Affine | None]  # (scale [C], shift [C]) behind the depthwise convolution
    weights: list[Tensor]
    atrous_rates: list[tuple[int, int]]
    shift: Tensor  # [sum O]
    pool_weight: Tensor | None  # [Q, C]
    pool_shift: Tensor | None  # [Q]
    project_weight: Tensor | None  # [P, sum O + Q, k, k], the pooled columns last where k is 1
    project_shift: Tensor | None  # [P]


def fold(head: Head, dtype: torch.dtype) -> Folded:
    """Fold the norms: ``norm(conv(x)) = (scale * W) x + shift``, ``scale = g / sqrt(var + eps)``.

    Computed in float32 (float64 for double) and rounded to ``dtype`` once. The norms must have
    running statistics.
    """
    depthwise = [
        None if b.depthwise is None else b.depthwise.weight.to(dtype) for b in head.branches
    ]
    between = [_between(b, dtype) if has_between(b) else None for b in head.branches]
    folded = [_fold_one(b.conv, lead(b.stages).norm) for b in head.branches]
    weights = [_as_read(w.to(dtype)) for w, _ in folded]
    shift = torch.cat([s for _, s in folded]).to(dtype)
    pool_weight = pool_shift = project_weight = project_shift = None
    if head.pool is not None:
        pool_weight, pool_shift = _fold_one(head.pool.conv, lead(head.pool.stages).norm)
        pool_weight, pool_shift = _as_read(pool_weight.flatten(1).to(dtype)), pool_shift.to(dtype)
    if head.project is not None:
        project_weight, project_shift = _fold_one(head.project, lead(head.stages).norm)
        if head.pools_into_bias:
            project_weight = torch.cat(columns(head, project_weight), 1)
        project_weight, project_shift = _as_read(project_weight.to(dtype)), project_shift.to(dtype)
    return Folded(
        *(depthwise, between, weights, [b.rate for b in head.branches], shift),
        *(pool_weight, pool_shift, project_weight, project_shift),
    )


def in_range(head: Head, folded: Folded) -> bool:
    """Whether the folded weights are as good as their factors, which multiply the pixels one after
    the other: finite, and with so many digits left in their dtype that rows of subnormal numbers
    add less than other roundings do, if the features are as the norms' statistics say."""
    last = head.project
    convs = [b.conv for b in head.branches]
    lists = [b.stages for b in head.branches]
    weight = head.weight
    if last is not None and head.join == "cat":
        weight = last.weight
        if head.pool is not None:
            convs, lists = [*convs, head.pool.conv], [*lists, head.pool.stages]
            weight = torch.cat(columns(head, weight), 1)
        read = torch.linalg.vector_norm(weight.flatten(2), dim=(0, 2), dtype=torch.double)
    else:  # each row alike
        read = weight.new_ones((sum(head.widths),), dtype=torch.double)
    norms = [lead(stages).norm for stages in lists]
    info = torch.finfo(folded.shift.dtype)
    good = _have_digits(convs, norms, read, info)
    good &= folded.shift.isfinite().all()
    if head.pool is not None and folded.pool_shift is not None:
        good &= folded.pool_shift.isfinite().all()
    if last is not None and folded.project_shift is not None:
        good &= _have_digits([last], [lead(head.stages).norm], torch.ones_like(read[:1]), info)
        good &= folded.project_shift.isfinite().all()
    for affine in folded.between:
        good &= affine is None or (affine[0].isfinite() & affine[1].isfinite()).all()
    return bool(good)


def _have_digits(
    convs: Sequence[Conv], norms: Sequence[Norm | None], columns: Tensor, info: torch.finfo
) -> Tensor:
    """Of the rows of all these, read by the next convolution's ``columns``."""
    largest = [torch.linalg.vector_norm(c.weight.flatten(1), torch.inf, 1) for c in convs]
    weight = torch.cat(largest).double()
    scales = [_scale(n, c, torch.double).abs() for n, c in zip(norms, convs, strict=True)]
    scale = torch.cat(scales)
    product = weight * scale
    # The part of a row that roundings of subnormal numbers are; of a zero in a factor, none.
    lost = (info.tiny * info.eps / product).clamp(max=1)
    lost = torch.where((weight == 0) | (scale == 0), 0, lost)
    shares = torch.cat([_deviation(n, s) for n, s in zip(norms, scales, strict=True)]) * columns
    noise, limit = (lost * shares).norm(), info.eps / 4 * shares.norm()
    return (product <= info.max).all() & (noise <= limit)


def _deviation(norm: Norm | None, scale: Tensor) -> Tensor:
    """[O], of a norm's results from their mean, where the ReLU leaves them."""
    if norm is None:
        return scale
    assert norm.running_var is not None
    var = norm.running_var.double()
    gamma = torch.ones_like(var) if norm.weight is None else norm.weight.double().abs()
    beta = torch.zeros_like(var) if norm.bias is None else norm.bias.double()
    gamma = gamma * (var / (var + norm.eps)).sqrt()
    return torch.where(gamma > 0, gamma * torch.special.ndtr(beta / gamma).sqrt(), 0)


def _scale(norm: Norm | None, conv: Conv, wide: torch.dtype) -> Tensor:
    if norm is None:
        return conv.weight.new_ones((conv.out_channels,), dtype=wide)
    assert norm.running_var is not None
    scale = (norm.running_var.to(wide) + norm.eps).rsqrt()
    return scale if norm.weight is None else scale * norm.weight.to(wide)


def _fold_one(conv: Conv, norm: Norm | None) -> tuple[Tensor, Tensor]:
    weight = conv.weight
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    scale, shift = _affine(conv, norm, wide)
    return weight.to(wide) * scale[:, None, None, None], shift


def _affine(conv: Conv, norm: Norm | None, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """(scale [O], shift [O]) of what follows the products: a bias and a norm."""
    scale = _scale(norm, conv, wide)
    shift = torch.zeros_like(scale)
    if norm is not None:
        assert norm.running_mean is not None
        shift = -norm.running_mean.to(wide)
    if conv.bias is not None:
        shift = shift + conv.bias.to(wide)
    shift = shift * scale
    if norm is not None and norm.bias is not None:
        shift = shift + norm.bias.to(wide)
    return scale, shift


def _between(branch: Branch, dtype: torch.dtype) -> Affine:
    assert branch.depthwise is not None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale, shift = _affine(branch.depthwise, lead(branch.between).norm, wide)
    return scale.to(dtype), shift.to(dtype)


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
