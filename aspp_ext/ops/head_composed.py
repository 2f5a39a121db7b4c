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
    project_weight: Tensor | None,
    project_shift: Tensor | None,
    polyphase: int = BY_COST,
    prepared: Sequence[Tensor] | None = None,
    channels_last: bool | None = None,
    relu: bool = True,
    project_relu: bool = True,
    *,
    family: Family = NATIVE,
) -> Tensor:
    """The operator's arguments, of which ``prepared`` is of no use here."""
    last = is_channels_last(x) if channels_last is None else channels_last
    if project_weight is None or project_shift is None:
        y = _branches(family, x, depthwise, weights, rates, shift, relu, polyphase, last)
        return like(x, y, last)
    # The projection reads channels_last in place.
    y = _branches(family, x, depthwise, weights, rates, shift, relu, polyphase, True)
    if pool_weight is not None and pool_shift is not None:
        widths = [y.size(1), pool_weight.size(0)]
        project_weight, of_pooled = project_weight.split(widths, 1)
        pool = (pool_weight, pool_shift, relu)
        project_shift = _pooled_shift(x, *pool, of_pooled, project_shift)
    project = _channels_last(project_weight.unsqueeze(2).unsqueeze(3))
    pyramid = family.op("atrous_pyramid")
    end = (None, project_shift, project_relu, allows_tf32(x), polyphase)
    return like(x, pyramid(y, [project], [1, 1], *end), last)


def _branches(
    family: Family,
    x: Tensor,
    depthwise: Sequence[Tensor],
    weights: Sequence[Tensor],
    rates: list[int],
    shift: Tensor,
    relu: bool,
    polyphase: int,
    last: bool,
) -> Tensor:
    """[N, sum O, H, W]: the branches side by side, before the projection.

    With ``last`` in channels_last, for which a weight's format asks a pyramid.
    """
    tf32 = allows_tf32(x)
    first, *others = weights
    asking = [_channels_last(first) if last else first, *others]
    if not any(d.numel() for d in depthwise):
        pyramid = family.op("atrous_pyramid")
        return pyramid(x, asking, rates, None, shift, relu, tf32, polyphase)
    # A plain 1x1 is a branch of a separable pyramid, too.
    separable = [
        d.numel() > 0 or tuple(w.shape[2:]) == (1, 1)
        for d, w in zip(depthwise, weights, strict=True)
    ]
    if all(separable):
        pyramid = family.op("atrous_separable_pyramid")
        none = [x.new_empty((0,))] * len(weights)  # no empty list: AOTInductor would make it None
        return pyramid(x, depthwise, asking, rates, none, none, False, None, shift, relu, tf32)
    # No pyramid has both kinds: each is computed with its own, one branch beside the other.
    parts = [
        _branches(family, x, [d], [w], rates[2 * b : 2 * b + 2], s, relu, polyphase, last)
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
    x: Tensor, pool_weight: Tensor, pool_shift: Tensor, relu: bool, project: Tensor, shift: Tensor
) -> Tensor:
    """[N, P]: what the pooled branch, constant over the plane, adds to the projection, and its
    shift [P] or [N, P].

    In float32 or wider and rounded once, as the sums inside the kernels are.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    pooled = F.linear(x.mean((2, 3), dtype=wide), pool_weight.to(wide), pool_shift.to(wide))
    pooled = pooled.relu() if relu else pooled
    return torch.addmm(shift.to(wide), pooled, project.to(wide).t()).to(x.dtype)
