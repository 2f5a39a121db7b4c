# SPDX-License-Identifier: BSD-3-Clause
"""``aspp_inference`` as pyramids behind one another, where no kernel does all of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .family import NATIVE, Family
from .formats import is_channels_last, like, pointwise_as_channels_last
from .polyphase_choice import BY_COST
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
    polyphase: int = BY_COST,
    prepared: Sequence[Tensor] | None = None,
    channels_last: bool | None = None,
    *,
    family: Family = NATIVE,
) -> Tensor:
    """The operator's arguments, of which ``prepared`` is of no use here."""
    y = _branches(family, x, depthwise, weights, rates, shift, polyphase)
    if pool_weight is not None and pool_shift is not None:
        widths = [y.size(1), pool_weight.size(0)]
        project_weight, of_pooled = project_weight.split(widths, 1)
        project_shift = _pooled_shift(x, pool_weight, pool_shift, of_pooled, project_shift)
    project = _channels_last(project_weight.unsqueeze(2).unsqueeze(3))
    pyramid = family.op("atrous_pyramid")
    end = (None, project_shift, True, allows_tf32(x), polyphase)
    return like(x, pyramid(y, [project], [1, 1], *end), channels_last)


def _branches(
    family: Family,
    x: Tensor,
    depthwise: Sequence[Tensor],
    weights: Sequence[Tensor],
    rates: list[int],
    shift: Tensor,
    polyphase: int,
) -> Tensor:
    """[N, sum O, H, W]: the branches side by side, before the projection.

    The projection reads channels_last in place; a weight's format asks a pyramid for it.
    """
    tf32 = allows_tf32(x)
    if not any(d.numel() for d in depthwise):
        first, *others = weights
        pyramid = family.op("atrous_pyramid")
        dense = [_channels_last(first), *others]
        return pyramid(x, dense, rates, None, shift, True, tf32, polyphase)
    # A plain 1x1 is a branch of a separable pyramid, too.
    separable = [
        d.numel() > 0 or tuple(w.shape[2:]) == (1, 1)
        for d, w in zip(depthwise, weights, strict=True)
    ]
    if all(separable):
        first, *others = weights
        pyramid, pointwise = family.op("atrous_separable_pyramid"), [_channels_last(first), *others]
        none = [x.new_empty((0,))] * len(weights)  # no empty list: AOTInductor would make it None
        return pyramid(x, depthwise, pointwise, rates, none, none, False, None, shift, True, tf32)
    # No pyramid has both kinds: each is computed with its own, one branch beside the other.
    parts = [
        _branches(family, x, [d], [w], rates[2 * b : 2 * b + 2], s, polyphase)
        for b, (d, w, s) in enumerate(
            zip(depthwise, weights, shift.split([w.size(0) for w in weights]), strict=True)
        )
    ]
    return torch.cat(parts, 1)


def _channels_last(weight: Tensor) -> Tensor:
    seen = pointwise_as_channels_last(weight)
    if seen.requires_grad and not is_channels_last(seen):
        return weight  # whose gradient has to lie as it does
    return seen.contiguous(memory_format=torch.channels_last)


def _pooled_shift(
    x: Tensor, pool_weight: Tensor, pool_shift: Tensor, project: Tensor, shift: Tensor
) -> Tensor:
    """[N, P]: what the pooled branch, constant over the plane, adds to the projection.

    In float32 or wider and rounded once, as the sums inside the kernels are.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    pooled = F.linear(x.mean((2, 3), dtype=wide), pool_weight.to(wide), pool_shift.to(wide))
    return F.linear(pooled.relu(), project.to(wide), shift.to(wide)).to(x.dtype)
