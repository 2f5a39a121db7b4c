# SPDX-License-Identifier: BSD-3-Clause
"""Batch norms folded into the weights before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aspp_ext.ops.formats import pointwise_as_channels_last

from .head import Head, Norm

# Times the smallest normal number: a row with a largest weight below has too many subnormal ones.
_FEW = 8


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
    the other: finite, and not so small that their dtype has few digits left for them."""
    info = torch.finfo(folded.project_weight.dtype)
    least = _FEW * info.tiny
    convs, norms = [b.conv for b in head.branches], [b.norm for b in head.branches]
    rows = _largest([*convs, head.pool], [*norms, head.pool_norm], info)
    projection = _largest([head.project], [head.project_norm], info)
    read = _norm(head.project.weight.flatten(1), 0)
    lost, lost_there = rows.small, projection.small
    if info.dtype != "float16":
        # No features make up for so small numbers, unless all the others are as small.
        lost = lost & (least * read > (rows.product * read).max())
        lost_there = lost_there & (projection.product.max() < least)
    whole = torch.cat([rows.product, projection.product]) <= info.max
    shifts = torch.cat([folded.shift, folded.pool_shift, folded.project_shift])
    return bool(whole.all() & shifts.isfinite().all() & ~lost.any() & ~lost_there.any())


class _Largest(NamedTuple):
    """Of each row of folded weights, in double."""

    product: Tensor  # the largest magnitude
    small: Tensor  # whether it is too small, though neither of its factors is


def _largest(convs: Sequence[nn.Conv2d], norms: Sequence[Norm], info: torch.finfo) -> _Largest:
    weight = torch.cat([_norm(c.weight.flatten(1), 1) for c in convs])
    scale = torch.cat([_scale(n, torch.float64).abs() for n in norms])
    product = weight * scale
    # Nothing is left of a weight, or of what a scale makes of the largest number, in their dtype.
    subnormal = info.tiny * info.eps
    nothing = (weight < subnormal) | (scale * info.max < subnormal)
    return _Largest(product, (product < _FEW * info.tiny) & ~nothing)


def _norm(matrix: Tensor, dim: int) -> Tensor:
    return torch.linalg.vector_norm(matrix, torch.inf, dim).double()


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
