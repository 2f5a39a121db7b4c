# SPDX-License-Identifier: BSD-3-Clause
"""Pure-PyTorch truth for every operator: one ``F.conv2d`` per branch and nothing clever.

Same names and signatures as the public operators, without what chooses between kernels and formats
(``backend``, ``polyphase``, ``prepared``, ``channels_last``). Shares no code with the planner or
the kernels, is differentiable by autograd to any order, and works in any dtype and on any device
that PyTorch's convolution works on. Everything else in the package is checked against these
functions in float64. Inputs are not validated here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Rate = int | tuple[int, int]
Affine = tuple[Tensor, Tensor]


def _same_conv(x: Tensor, weight: Tensor, rate: Rate, groups: int = 1) -> Tensor:
    """Stride 1, zero padding ``rate * (k - 1) / 2``: the output is as large as the input."""
    kernel = weight.shape[2:]
    # A 1-D problem is a row, so its rate is the pair's last entry.
    rates = [rate] * len(kernel) if isinstance(rate, int) else list(rate)[-len(kernel) :]
    rates = [within(r, size) for r, size in zip(rates, x.shape[2:], strict=True)]
    padding = [r * (k - 1) // 2 for r, k in zip(rates, kernel, strict=True)]
    conv = F.conv1d if len(kernel) == 1 else F.conv2d
    return conv(x, weight, None, 1, padding, rates, groups)


def within(rate: int, size: int) -> int:
    """A rate that computes the same: beyond the map only the centre tap lives, whatever the rate.

    oneDNN counts in 32 bits. A symbolic size is not compared where that does not matter: a program
    would be for sizes on one side of the rate alone.
    """
    return rate if rate < 2**16 and not isinstance(size, int) else min(rate, size)


def _per_channel(value: Tensor, ndim: int) -> Tensor:
    """[O] or [N, O] -> broadcastable to [N, O, H, W] (or [N, O, L])."""
    value = value[None] if value.dim() == 1 else value
    return value.reshape((*value.shape, *[1] * (ndim - 2)))


def _activate(y: Tensor, activation: str | None) -> Tensor:
    return torch.relu(y) if activation == "relu" else y


def _finish(
    y: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
) -> Tensor:
    if bias is not None:
        y = y + _per_channel(bias, y.dim())
    if scale is not None:
        y = y * _per_channel(scale, y.dim())
    if shift is not None:
        y = y + _per_channel(shift, y.dim())
    return _activate(y, activation)


def atrous_pyramid(
    x: Tensor,
    weights: Sequence[Tensor],
    atrous_rates: Sequence[Rate],
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Parallel atrous convolutions of one input, concatenated over channels.

    ``y = activation((concat_b conv(x, weights[b], atrous_rates[b]) + bias) * scale + shift)``

    Args:
        x: [N, C, H, W] or [N, C, L].
        weights: one [O_b, C, kh_b, kw_b] (or [O_b, C, k_b]) per branch, kernel sizes odd.
        atrous_rates: one int, or (rate_h, rate_w), per branch.
        bias: [sum O_b].
        scale: [sum O_b].
        shift: [sum O_b] or [N, sum O_b].
        activation: None or "relu".

    Returns:
        [N, sum O_b, H, W] (or [N, sum O_b, L]).
    """
    branches = [_same_conv(x, w, r) for w, r in zip(weights, atrous_rates, strict=True)]
    return _finish(torch.cat(branches, 1), bias, scale, shift, activation)


def atrous_separable_pyramid(
    x: Tensor,
    depthwise_weights: Sequence[Tensor | None],
    pointwise_weights: Sequence[Tensor],
    atrous_rates: Sequence[Rate],
    *,
    between: Sequence[Affine | None] | None = None,
    between_activation: str | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Parallel depthwise-separable atrous convolutions of one input, concatenated over channels.

    Branch b: depthwise atrous convolution, then ``between_activation(d * scale_b + shift_b)``
    where ``between[b]`` is given, then the 1x1 convolution ``pointwise_weights[b]``.

    Args:
        x: [N, C, H, W] or [N, C, L].
        depthwise_weights: per branch [C, 1, kh_b, kw_b], or None for a plain 1x1 convolution.
        pointwise_weights: per branch [O_b, C, 1, 1] (or [O_b, C, 1]).
        atrous_rates: one int, or (rate_h, rate_w), per branch.
        between: None, or per branch None or (scale [C], shift [C]).
        between_activation: None or "relu", applied only where ``between[b]`` is given.
        bias, scale, shift, activation: as in :func:`atrous_pyramid`.

    Returns:
        [N, sum O_b, H, W] (or [N, sum O_b, L]).
    """
    affines = [None] * len(pointwise_weights) if between is None else list(between)
    branches = []
    for depthwise, pointwise, rate, affine in zip(
        depthwise_weights, pointwise_weights, atrous_rates, affines, strict=True
    ):
        y = x
        if depthwise is not None:
            y = _same_conv(y, depthwise, rate, groups=x.shape[1])
        if affine is not None:
            y = _finish(y, None, affine[0], affine[1], between_activation)
        branches.append(_same_conv(y, pointwise, 1))
    return _finish(torch.cat(branches, 1), bias, scale, shift, activation)


def atrous_separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    atrous_rate: Rate,
    *,
    between: Affine | None = None,
    between_activation: str | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """One branch of :func:`atrous_separable_pyramid`: depthwise atrous, then 1x1.

    Args:
        x: [N, C, H, W].
        depthwise_weight: [C, 1, kh, kw].
        pointwise_weight: [O, C, 1, 1].
        atrous_rate: int or (rate_h, rate_w).
        between: None or (scale [C], shift [C]) applied between the two convolutions.
        between_activation, bias, scale, shift, activation: as in the pyramid.

    Returns:
        [N, O, H, W].
    """
    return atrous_separable_pyramid(
        x,
        [depthwise_weight],
        [pointwise_weight],
        [atrous_rate],
        between=[between],
        between_activation=between_activation,
        bias=bias,
        scale=scale,
        shift=shift,
        activation=activation,
    )


def aspp_inference(
    x: Tensor,
    depthwise_weights: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    atrous_rates: Sequence[Rate],
    shift: Tensor,
    pool_weight: Tensor | None,
    pool_shift: Tensor | None,
    project_weight: Tensor | None,
    project_shift: Tensor | None,
    *,
    activation: str | None = "relu",
    project_activation: str | None = "relu",
) -> Tensor:
    """A whole ASPP head whose batch norms are already folded into its weights.

    ``y = project_activation(project_weight @ concat(branches, pooled) + project_shift)`` where
    branch b is ``activation(conv_b(x) + shift_b)`` and pooled is
    ``activation(pool_weight @ mean_hw(x) + pool_shift)``, the same at every pixel. Without a
    projection ``y = concat(branches)``.

    Args:
        x: [N, C, H, W].
        depthwise_weights: per branch None (dense branch) or [C, 1, kh_b, kw_b].
        weights: per branch [O_b, C, kh_b, kw_b] when dense, else the pointwise [O_b, C, 1, 1].
        atrous_rates: one int, or (rate_h, rate_w), per branch.
        shift: [sum O_b].
        pool_weight: [O_p, C], or None when there is no pooled branch.
        pool_shift: [O_p], or None.
        project_weight: [P, sum O_b + O_p], or None when there is no projection.
        project_shift: [P] or [N, P], or None.
        activation, project_activation: None or "relu".

    Returns:
        [N, P, H, W], or without a projection [N, sum O_b, H, W].
    """
    branches = []
    for depthwise, weight, rate in zip(depthwise_weights, weights, atrous_rates, strict=True):
        if depthwise is None:
            branches.append(_same_conv(x, weight, rate))
        else:
            mid = _same_conv(x, depthwise, rate, groups=x.shape[1])
            branches.append(_same_conv(mid, weight, 1))
    y = _finish(torch.cat(branches, 1), None, None, shift, activation)
    if project_weight is None or project_shift is None:
        return y
    if pool_weight is not None:
        pooled = F.linear(x.mean((2, 3)), pool_weight, pool_shift)
        pooled = _per_channel(_activate(pooled, activation), x.dim())
        y = torch.cat([y, pooled.expand((-1, -1, *x.shape[2:]))], 1)
    bias, rows = (project_shift, None) if project_shift.dim() == 1 else (None, project_shift)
    y = F.conv2d(y, project_weight[:, :, None, None], bias)
    return _finish(y, None, None, rows, project_activation)
