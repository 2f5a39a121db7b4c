# SPDX-License-Identifier: BSD-3-Clause
"""A :class:`Head` in eval mode without gradients, its norms in the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from aspp_ext.ops import aspp_inference, atrous_pyramid, atrous_separable_pyramid
from aspp_ext.ops.polyphase_choice import Decided

from .folded import Folded
from .head import Head, branches_lie_channels_last, gives_channels_last, has_between, lead
from .layers import Result, finish
from .prepared import Prepared
from .stages import Stage, is_idle, run, run_beside

_NO_PROJECTION = (None, None, None, None)  # and no pool


def foldable(head: Head) -> bool:
    """Whether all of its convolutions are in eval mode what :class:`Folded` holds."""
    with_between = [b for b in head.branches if has_between(b)]
    if not with_between:
        return True
    # One call of the separable pyramid has them all, with one activation between.
    leads = [lead(b.between) for b in with_between]
    plain = all(b.depthwise or tuple(b.conv.kernel_size) == (1, 1) for b in head.branches)
    same = all(one.relu == leads[0].relu for one in leads)
    return plain and same and all(is_idle(s) for one in leads for s in one.rest)


def infer(
    head: Head, folded: Folded, x: Tensor, polyphase: bool | Decided, prepared: Prepared
) -> Result:
    """The head of x [N, C, H, W], by its folded weights.

    Args:
        head: the parts, of which the stages that are not folded run.
        folded: in x's dtype.
        x: the features.
        polyphase: as in :func:`aspp_ext.atrous_pyramid`.
        prepared: the weights of the branches and of the projection, for minimal filtering of maps
            of x's size, or None.

    Returns:
        As :func:`aspp_ext.modules.layers.forward_layers`.
    """
    last = gives_channels_last(head, x)
    leads = [lead(b.stages) for b in head.branches]
    after = lead(head.stages)
    of_branches = (folded.depthwise_weights, folded.weights, folded.atrous_rates, folded.shift)
    activation = "relu" if leads[0].relu else None
    at_end = "relu" if after.relu else None
    if head.is_standard:
        assert folded.project_weight is not None
        y = aspp_inference(
            x,
            *of_branches,
            folded.pool_weight,
            folded.pool_shift,
            folded.project_weight.flatten(1),
            folded.project_shift,
            activation=activation,
            project_activation=at_end,
            polyphase=polyphase,
            prepared=prepared.branches,
            channels_last=last,
        )
        for stage in after.rest:
            y = y if is_idle(stage) else run(stage, y)
        return y

    y = _pyramid(head, folded, x, activation, polyphase, prepared.branches)
    columns = zip(*(one.rest for one in leads), strict=True)
    busy = [stages for stages in columns if not all(map(is_idle, stages))]
    lists = list(zip(*busy, strict=True)) or [()] * len(leads)
    y = run_beside(lists, y, head.widths, branches_lie_channels_last(head, x))
    pooled = None
    if head.pool is not None:
        pooled = _pooled_map(head, folded, x)

    def project(y: Tensor, pooled: Tensor | None) -> Tensor:
        assert head.project is not None
        assert folded.project_weight is not None
        weight, shift = folded.project_weight, folded.project_shift
        if pooled is not None:
            weight, of_pooled = weight.split([sum(head.widths), pooled.shape[1]], 1)
            shift = F.conv2d(pooled, of_pooled, shift).flatten(1)
            return atrous_pyramid(y, [weight], [1], shift=shift, activation=at_end)
        rate_h, rate_w = head.project.dilation
        assert shift is not None
        return aspp_inference(
            y,
            [None],
            [weight],
            [(rate_h, rate_w)],
            shift,
            *_NO_PROJECTION,
            activation=at_end,
            polyphase=polyphase,
            prepared=prepared.project,
            channels_last=last,
        )

    return finish(head, x, y, pooled, project, _busy(after.rest))


def _busy(stages: Sequence[Stage]) -> list[Stage]:
    return [s for s in stages if not is_idle(s)]


def _pyramid(
    head: Head,
    folded: Folded,
    x: Tensor,
    activation: str | None,
    polyphase: bool | Decided,
    prepared: Sequence[Tensor] | None,
) -> Tensor:
    """[N, sum O, H, W], channels_last: the branches with their folded norms, side by side."""
    weights, rates, shift = folded.weights, folded.atrous_rates, folded.shift
    if any(affine is not None for affine in folded.between):
        deep = next(b for b in head.branches if has_between(b))
        return atrous_separable_pyramid(
            x,
            folded.depthwise_weights,
            weights,
            rates,
            between=folded.between,
            between_activation="relu" if lead(deep.between).relu else None,
            shift=shift,
            activation=activation,
        )
    return aspp_inference(
        x,
        folded.depthwise_weights,
        weights,
        rates,
        shift,
        *_NO_PROJECTION,
        activation=activation,
        polyphase=polyphase,
        prepared=prepared,
        channels_last=True,
    )


def _pooled_map(head: Head, folded: Folded, x: Tensor) -> Tensor:
    """[N, Q, 1, 1]."""
    assert head.pool is not None
    assert folded.pool_weight is not None
    of_pool = lead(head.pool.stages)
    mean = F.adaptive_avg_pool2d(x, 1)
    y = F.conv2d(mean, folded.pool_weight.unsqueeze(2).unsqueeze(3), folded.pool_shift)
    y = y.relu_() if of_pool.relu else y
    for stage in _busy(of_pool.rest):
        y = stage(y)
    return y
