# SPDX-License-Identifier: BSD-3-Clause
"""The differentiable computation of a :class:`Head`, with every norm's own rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from aspp_ext.ops import atrous_pyramid, atrous_separable_pyramid
from aspp_ext.ops.formats import memory_format, pointwise_as_channels_last
from aspp_ext.ops.pyramid_statistics import atrous_pyramid_statistics

from .head import (
    Branch,
    Conv,
    Head,
    branches_lie_channels_last,
    columns,
    gives_channels_last,
    has_between,
    joins_channels_last,
    lead,
    pooled_norm,
    single_pooled_value,
)
from .joint_norm import Norm, joinable, uses_statistics
from .stages import Stage, is_random, parts, run, run_beside

Result = Tensor | list[Tensor]


def forward_layers(head: Head, x: Tensor, pool_batch_of_one: str, polyphase: bool = True) -> Result:
    """The head with gradients, and with every norm's own rules.

    Args:
        head: the parts.
        x: [N, C, H, W].
        pool_batch_of_one: "error", or "running_stats" to normalise the pooled branch of a single
            sample with its running statistics.
        polyphase: as in :func:`aspp_ext.atrous_pyramid`.

    Returns:
        [N, P, H, W], or each branch's map where nobody joins them.

    Raises:
        ValueError: the pooled branch would train its batch norm on one value per channel.
    """
    by_running_stats = single_pooled_value(head, x, pool_batch_of_one)
    y, statistics = _convolved(head.branches, x, polyphase)
    lists = [b.stages for b in head.branches]
    y = run_beside(lists, y, head.widths, branches_lie_channels_last(head, x), statistics)
    pooled = None if head.pool is None else _pooled_map(head, x, by_running_stats)

    def project(y: Tensor, pooled: Tensor | None) -> Tensor:
        assert head.project is not None
        weight, shift = head.project.weight, head.project.bias
        if pooled is not None:
            # The pooled map is constant over the plane, so its share of the projection is a bias
            # [N, P]. A copy: who lets saved tensors be written to tells them by their addresses.
            weight, of_pooled = columns(head, weight)
            shift = F.conv2d(pooled, of_pooled.clone(), shift).flatten(1)
        rate_h, rate_w = head.project.dilation
        rates = [(rate_h, rate_w)]
        return atrous_pyramid(y, [weight], rates, shift=shift, polyphase=polyphase)

    return finish(head, x, y, pooled, project, head.stages)


def _pooled_map(head: Head, x: Tensor, by_running_stats: bool) -> Tensor:
    """[N, Q, 1, 1]: the pooled branch."""
    assert head.pool is not None
    y = F.adaptive_avg_pool2d(x, 1)
    y = F.conv2d(y, head.pool.conv.weight, head.pool.conv.bias)
    single = pooled_norm(head) if by_running_stats else None
    for stage in head.pool.stages:
        y = _running_stats_norm(single, y) if stage is single and single is not None else stage(y)
    return y


def finish(
    head: Head,
    x: Tensor,
    y: Tensor,
    pooled: Tensor | None,
    project: Callable[[Tensor, Tensor | None], Tensor],
    stages: Sequence[Stage],
) -> Result:
    """What follows the branches.

    Args:
        head: the parts.
        x: [N, C, H, W], the features, which with the weights say how maps lie in memory.
        y: [N, sum O, H, W], the branches side by side, ours.
        pooled: [N, Q, 1, 1], or None.
        project: the projection, of the joint map, or of the branches and the pooled map.
        stages: what follows the projection.
    """
    if head.join == "none":
        return parts(y, head.widths, branches_lie_channels_last(head, x))
    last = memory_format(gives_channels_last(head, x))
    if head.join == "sum":
        y = y.unflatten(1, (len(head.branches), head.widths[0])).sum(1)
    if pooled is not None and not head.pools_into_bias:
        y, pooled = spread(head, y, pooled), None
    y = _run_all(head.joined, y, memory_format(joins_channels_last(head, x)))
    if head.project is not None:
        y = _run_all(stages, project(y, pooled), last)
    return y.contiguous(memory_format=last)


def spread(head: Head, y: Tensor, pooled: Tensor) -> Tensor:
    """[N, sum O + Q, H, W]: with the pooled map over the plane, in its place."""
    assert head.pool is not None
    first = sum(head.widths[: head.pool.place])
    pooled = pooled.expand((-1, -1, *y.shape[2:]))
    sides = y.split([first, y.shape[1] - first], 1)
    return torch.cat([sides[0], pooled, sides[1]], 1)


def _run_all(stages: Sequence[Stage], y: Tensor, inner: torch.memory_format) -> Tensor:
    """On a map that is ours, in the format that the layers' own would have where one draws."""
    for stage in stages:
        if is_random(stage):
            y = y.contiguous(memory_format=inner)
        y = run(stage, y)
    return y


def _convolved(
    branches: Sequence[Branch], x: Tensor, polyphase: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """[N, sum O, H, W], and its statistics where a batch norm has a use for them."""
    weights = [b.conv.weight for b in branches]
    rates = [b.rate for b in branches]
    # Batch norm and projection are several times faster in channels_last, so that is what the
    # pyramid is asked for, by the one means there is: the memory format of a weight.
    weights[0] = pointwise_as_channels_last(weights[0])
    bias = joint_bias([b.conv for b in branches])
    separable = [b.depthwise is not None for b in branches]
    if any(separable):
        plain = [b.conv.kernel_size == (1, 1) for b in branches]
        one_call = all(s or p for s, p in zip(separable, plain, strict=True))
        if not one_call or any(has_between(b) for b in branches):
            return torch.cat([_one_branch(b, x, polyphase) for b in branches], 1), None
        depthwise = [None if b.depthwise is None else b.depthwise.weight for b in branches]
        return atrous_separable_pyramid(x, depthwise, weights, rates, bias=bias), None
    leading = [lead(b.stages).norm for b in branches]
    norms = [n for n in leading if n is not None]
    known = bias is None and len(norms) == len(branches)
    if known and joinable(norms, x) and uses_statistics(norms):
        y, mean, squares = atrous_pyramid_statistics(x, weights, rates, polyphase=polyphase)
        return y, None if mean is None or squares is None else (mean, squares)
    return atrous_pyramid(x, weights, rates, bias=bias, polyphase=polyphase), None


def _one_branch(branch: Branch, x: Tensor, polyphase: bool) -> Tensor:
    """[N, O, H, W]: a branch that no pyramid has beside the others."""
    rates, deep = [branch.rate], branch.depthwise
    weights, bias = [branch.conv.weight], branch.conv.bias
    if deep is None:
        return atrous_pyramid(x, weights, rates, bias=bias, polyphase=polyphase)
    if not has_between(branch):
        return atrous_separable_pyramid(x, [deep.weight], weights, rates, bias=bias)
    y = F.conv2d(x, deep.weight, deep.bias, 1, "same", deep.dilation, deep.groups)
    for stage in branch.between:
        y = run(stage, y)
    return F.conv2d(y, weights[0], bias)


def joint_bias(convs: Sequence[Conv]) -> Tensor | None:
    """[sum O], or None where no convolution has one."""
    if all(c.bias is None for c in convs):
        return None
    zeros = convs[0].weight.new_zeros
    return torch.cat([zeros((c.weight.shape[0],)) if c.bias is None else c.bias for c in convs])


def _running_stats_norm(norm: Norm, x: Tensor) -> Tensor:
    mean, var = norm.running_mean, norm.running_var
    return F.batch_norm(x, mean, var, norm.weight, norm.bias, False, 0.0, norm.eps)
