# SPDX-License-Identifier: BSD-3-Clause
"""``aspp_inference`` of dense branches as two dense pyramids, where no kernel does all of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import like, pointwise_as_channels_last
from .precision import allows_tf32


def aspp_inference(
    x: Tensor,
    depthwise: Sequence[Tensor],
    weights: Sequence[Tensor],
    rates: list[int],
    shift: Tensor,
    pool_weight: Tensor | None,
    pool_shift: Tensor | None,
    project_weight: Tensor,
    project_shift: Tensor,
) -> Tensor:
    """The operator's arguments, all depthwise weights empty; [N, P, H, W] in x's memory format."""
    pyramid, tf32 = torch.ops.aspp_ext.atrous_pyramid, allows_tf32(x)
    # The projection reads channels_last in place; a weight's format asks the branches for it.
    first, *others = weights
    y = pyramid(x, [_channels_last(first), *others], rates, None, shift, True, tf32)
    if pool_weight is not None and pool_shift is not None:
        widths = [y.size(1), pool_weight.size(0)]
        project_weight, of_pooled = project_weight.split(widths, 1)
        project_shift = _pooled_shift(x, pool_weight, pool_shift, of_pooled, project_shift)
    project = _channels_last(project_weight.unsqueeze(2).unsqueeze(3))
    return like(x, pyramid(y, [project], [1, 1], None, project_shift, True, tf32))


def _channels_last(weight: Tensor) -> Tensor:
    return pointwise_as_channels_last(weight).contiguous(memory_format=torch.channels_last)


def _pooled_shift(
    x: Tensor, pool_weight: Tensor, pool_shift: Tensor, project: Tensor, shift: Tensor
) -> Tensor:
    """[N, P]: what the pooled branch, constant over the plane, adds to the projection.

    In float32 or wider and rounded once, as the sums inside the kernels are.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    pooled = F.linear(x.mean((2, 3), dtype=wide), pool_weight.to(wide), pool_shift.to(wide))
    return F.linear(pooled.relu(), project.to(wide), shift.to(wide)).to(x.dtype)
