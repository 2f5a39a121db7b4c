# SPDX-License-Identifier: BSD-3-Clause
"""What the fused forward reads of an ASPP module, and its differentiable computation.

A :class:`Head` holds the module's own submodules, not copies: parameters, buffers and training
flags are always the live ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aspp_ext.ops import atrous_pyramid, atrous_separable_pyramid
from aspp_ext.ops.checks import shown
from aspp_ext.ops.formats import is_channels_last, memory_format, pointwise_as_channels_last
from aspp_ext.ops.pyramid_statistics import atrous_pyramid_statistics

from .joint_norm import Norm, joinable, joint_norm, one_norm, uses_statistics
from .tracing import in_forward_mode


class Branch(NamedTuple):
    """relu(norm(conv(depthwise(x)))), where a dense or 1x1 branch has no depthwise part."""

    depthwise: nn.Conv2d | None  # weight [C, 1, kh, kw]
    conv: nn.Conv2d  # weight [O, C, kh, kw]; [O, C, 1, 1] behind a depthwise convolution
    norm: Norm
    rate: tuple[int, int]


class Head(NamedTuple):
    """The parts of one ASPP module, in the order in which their outputs are concatenated."""

    branches: tuple[Branch, ...]
    pool: nn.Conv2d  # weight [O, C, 1, 1], applied to the mean over the plane
    pool_norm: Norm
    project: nn.Conv2d  # weight [P, sum O_b + O, 1, 1]
    project_norm: Norm
    dropout: nn.Module

    def convs(self) -> list[nn.Conv2d]:
        """Every convolution, depthwise ones included."""
        found = [b.depthwise for b in self.branches if b.depthwise is not None]
        return [*found, *(b.conv for b in self.branches), self.pool, self.project]

    def norms(self) -> list[Norm]:
        """Every norm."""
        return [*(b.norm for b in self.branches), self.pool_norm, self.project_norm]


POOL_BATCH_OF_ONE = ("error", "running_stats")


def check_pool_batch_of_one(value: str, op: str = "ASPP") -> str:
    """Return ``value``, or raise ValueError when it is not one of the two known policies."""
    if not isinstance(value, str) or value not in POOL_BATCH_OF_ONE:
        raise ValueError(
            f"{op}: pool_batch_of_one must be one of {POOL_BATCH_OF_ONE}, got {shown(value)}"
        )
    return value


def forward_layers(head: Head, x: Tensor, pool_batch_of_one: str, polyphase: bool = True) -> Tensor:
    """The head with gradients, and with every norm's own rules.

    Args:
        head: the parts.
        x: [N, C, H, W].
        pool_batch_of_one: "error", or "running_stats" to normalise the pooled branch of a single
            sample with its running statistics.
        polyphase: as in :func:`aspp_ext.atrous_pyramid`.

    Returns:
        [N, P, H, W].

    Raises:
        ValueError: the pooled branch would train its batch norm on one value per channel.
    """
    pool_by_running_stats = _single_pooled_value(head, x, pool_batch_of_one)
    convs = [b.conv for b in head.branches]
    rates = [b.rate for b in head.branches]
    weights = [c.weight for c in convs]
    # Batch norm and projection are several times faster in channels_last, so that is what the
    # pyramid is asked for, by the one means there is: the memory format of a weight.
    weights[0] = pointwise_as_channels_last(weights[0])
    bias = _joint_bias(convs)
    norms = [b.norm for b in head.branches]
    joined = joinable(norms, x)
    mean = squares = None
    if any(b.depthwise is not None for b in head.branches):
        depthwise = [None if b.depthwise is None else b.depthwise.weight for b in head.branches]
        y = atrous_separable_pyramid(x, depthwise, weights, rates, bias=bias)
    elif bias is None and joined and uses_statistics(norms):
        y, mean, squares = atrous_pyramid_statistics(x, weights, rates, polyphase=polyphase)
    else:
        y = atrous_pyramid(x, weights, rates, bias=bias, polyphase=polyphase)
    y = joint_norm(norms, y, mean, squares) if joined else _norm_each(norms, y)
    y = _relu(y)

    pooled = head.pool(F.adaptive_avg_pool2d(x, 1))  # [N, O, 1, 1]
    if pool_by_running_stats:
        pooled = _running_stats_norm(head.pool_norm, pooled)
    else:
        pooled = head.pool_norm(pooled)
    weight, pool_weight = head.project.weight.split([y.shape[1], pooled.shape[1]], 1)
    # The pooled map is constant over the plane, so its share of the projection is a bias [N, P].
    # A copy: who lets saved tensors be written to tells them by their addresses.
    shift = F.conv2d(_relu(pooled), pool_weight.clone(), head.project.bias).flatten(1)
    y = atrous_pyramid(y, [weight], [1], shift=shift, polyphase=polyphase)
    y = _relu(one_norm(head.project_norm, y))
    return head.dropout(y.contiguous(memory_format=memory_format(gives_channels_last(head))))


def gives_channels_last(head: Head) -> bool:
    """Whether the layers' own result would be channels_last.

    The pooled map that is spread over the plane is contiguous, and so is its concatenation with the
    branches in whatever format: the projection's weight alone decides. It matters to a dropout,
    which draws in the order of the memory.
    """
    return is_channels_last(head.project.weight)


def _relu(y: Tensor) -> Tensor:
    """In place where nobody else has seen y. What a subclass of Tensor makes inside an autograd
    function is a view, not to be written over, and what linearize records is kept."""
    return y.relu() if type(y) is not Tensor or in_forward_mode() else y.relu_()


def _norm_each(norms: list[Norm], y: Tensor) -> Tensor:
    """``norm(.)`` of each branch's channels of y ``[N, sum O, H, W]``."""
    inner = memory_format(is_channels_last(y))
    # split, not slices: its backward is one concatenation instead of a padded map per branch.
    # A batch norm of a strided slice takes up to 100 times as long as one of a dense copy.
    parts = y.split([n.num_features for n in norms], 1)
    parts = [p.contiguous(memory_format=inner) for p in parts]
    return torch.cat([n(p) for n, p in zip(norms, parts, strict=True)], 1)


def _joint_bias(convs: list[nn.Conv2d]) -> Tensor | None:
    if all(c.bias is None for c in convs):
        return None
    zeros = convs[0].weight.new_zeros
    return torch.cat([zeros((c.weight.shape[0],)) if c.bias is None else c.bias for c in convs])


def _single_pooled_value(head: Head, x: Tensor, pool_batch_of_one: str) -> bool:
    """Whether the pooled branch must use its running statistics; raises where it may not."""
    norm = head.pool_norm
    if not norm.training or x.shape[0] != 1 or _synchronised(norm):
        return False
    if pool_batch_of_one == "running_stats":
        if norm.running_mean is None:
            raise ValueError(
                "ASPP: pool_batch_of_one='running_stats' needs running statistics in the pooled "
                "branch, but its norm has track_running_stats=False"
            )
        return True
    raise ValueError(
        "Expected more than 1 value per channel when training, got input size "
        f"torch.Size([1, {norm.num_features}, 1, 1]): the batch norm of ASPP's pooled branch sees "
        "one value per channel in a batch of one. Train with at least 2 samples (drop_last=True "
        "in the DataLoader), put that norm in eval mode, or set "
        "pool_batch_of_one='running_stats' to use its running statistics for such batches"
    )


def _synchronised(norm: Norm) -> bool:
    """Whether the norm gathers its statistics from more than this process."""
    if not isinstance(norm, nn.SyncBatchNorm):
        return False
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return distributed.get_world_size(norm.process_group) > 1


def _running_stats_norm(norm: Norm, x: Tensor) -> Tensor:
    mean, var = norm.running_mean, norm.running_var
    return F.batch_norm(x, mean, var, norm.weight, norm.bias, False, 0.0, norm.eps)
