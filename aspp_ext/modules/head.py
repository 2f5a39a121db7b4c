# SPDX-License-Identifier: BSD-3-Clause
"""What the fused forward reads of an ASPP module.

A :class:`Head` holds the module's own submodules and parameters, not copies: values and training
flags are always the live ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aspp_ext.ops.checks import shown
from aspp_ext.ops.formats import is_channels_last

from .joint_norm import Norm
from .stages import Stage, is_batch_norm, is_idle, is_relu


class RawConv(NamedTuple):
    """A convolution of parameters that belong to no ``nn.Conv2d``; its attributes are that's."""

    weight: Tensor  # [O, C / groups, kh, kw]
    bias: Tensor | None
    dilation: tuple[int, int]
    groups: int

    @property
    def out_channels(self) -> int:
        """O."""
        return self.weight.shape[0]

    @property
    def in_channels(self) -> int:
        """C."""
        return self.weight.shape[1] * self.groups

    @property
    def kernel_size(self) -> tuple[int, int]:
        """(kh, kw)."""
        return (self.weight.shape[2], self.weight.shape[3])


Conv = nn.Conv2d | RawConv


def is_atrous(kernel: Sequence[int], rate: Sequence[int]) -> bool:
    """Whether a convolution reads pixels that are apart."""
    return any(k > 1 and r > 1 for k, r in zip(kernel, rate, strict=True))


def same_padding(kernel: Sequence[int], rate: Sequence[int]) -> tuple[int, ...]:
    """That with which an odd kernel keeps the size of a map."""
    return tuple(r * (k - 1) // 2 for k, r in zip(kernel, rate, strict=True))


class Branch(NamedTuple):
    """stages(conv(between(depthwise(x)))), where a dense or 1x1 branch has no depthwise part."""

    depthwise: Conv | None  # weight [C, 1, kh, kw]
    between: Sequence[Stage]
    conv: Conv  # weight [O, C, kh, kw]; [O, C, 1, 1] behind a depthwise convolution
    stages: Sequence[Stage]

    @property
    def rate(self) -> tuple[int, int]:
        """Of the taps that look around."""
        rate_h, rate_w = (self.depthwise or self.conv).dilation
        return (rate_h, rate_w)


def has_between(branch: Branch) -> bool:
    """Whether something stands between depthwise and pointwise convolution."""
    return bool(branch.between) or (
        branch.depthwise is not None and branch.depthwise.bias is not None
    )


class Pool(NamedTuple):
    """stages(conv(mean of x over the plane)), the same at each pixel."""

    conv: Conv  # weight [Q, C, 1, 1]
    stages: Sequence[Stage]
    place: int  # before which branch it is among what is concatenated; behind all: their number


class Lead(NamedTuple):
    """How a list of stages begins: with what folds into the convolution before it."""

    norm: Norm | None
    relu: bool
    rest: Sequence[Stage]


def lead(stages: Sequence[Stage]) -> Lead:
    """A batch norm, if it is the first, and a ReLU, if it is next."""
    rest, norm, relu = list(stages), None, False
    if rest and is_batch_norm(rest[0]):
        norm = rest.pop(0)
    if rest and is_relu(rest[0]):
        rest.pop(0)
        relu = True
    return Lead(norm, relu, rest)  # type: ignore[arg-type]


class Head(NamedTuple):
    """The parts of one pyramid.

    Branches and the pooled map are concatenated in this order, or the branches are added up, or
    nobody joins them; stages follow, a projection, and its stages. The branches' stages are as many
    in each and of the same kinds one by one.
    """

    branches: Sequence[Branch]
    pool: Pool | None
    join: str  # "cat", "sum", or "none": each branch's map is a result
    joined: Sequence[Stage]  # of the joint map
    project: Conv | None  # weight [P, sum O + Q, k, k], zero "same" padded
    stages: Sequence[Stage]  # of the projection

    @property
    def weight(self) -> Tensor:
        """One whose dtype and device are the head's."""
        return self.branches[0].conv.weight

    @property
    def channels(self) -> int:
        """C of the features."""
        return (self.branches[0].depthwise or self.branches[0].conv).in_channels

    @property
    def widths(self) -> list[int]:
        """Channels of each branch."""
        return [b.conv.out_channels for b in self.branches]

    def convs(self) -> list[Conv]:
        """Every convolution, depthwise ones included."""
        found = [b.depthwise for b in self.branches if b.depthwise is not None]
        found += [b.conv for b in self.branches]
        found += [] if self.pool is None else [self.pool.conv]
        return found if self.project is None else [*found, self.project]

    def folded_norms(self) -> Iterator[Norm]:
        """Those that go into the weights in eval mode."""
        between = (s for b in self.branches for s in b.between if is_batch_norm(s))
        yield from between  # type: ignore[misc]
        lists = [b.stages for b in self.branches]
        lists += [] if self.pool is None else [self.pool.stages]
        for stages in (*lists, self.stages):
            if (norm := lead(stages).norm) is not None:
                yield norm

    @property
    def pools_into_bias(self) -> bool:
        """Whether the pooled map, constant over the plane, is a bias of the projection."""
        if self.pool is None or self.project is None or self.joined:
            return False
        return self.join == "cat" and tuple(self.project.kernel_size) == (1, 1)

    @property
    def is_standard(self) -> bool:
        """Whether ``aspp_inference`` is all of it, but for what follows the projection's ReLU."""
        if self.join != "cat" or self.joined or self.project is None:
            return False
        if tuple(self.project.kernel_size) != (1, 1):
            return False
        leads = [lead(b.stages) for b in self.branches]
        leads += [] if self.pool is None else [lead(self.pool.stages)]
        same = all(one.relu == leads[0].relu and _all_idle(one.rest) for one in leads)
        return same and not any(has_between(b) for b in self.branches)


def _all_idle(stages: Sequence[Stage]) -> bool:
    return all(is_idle(s) for s in stages)


def columns(head: Head, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Those of a projection's weight [P, sum O + Q, ...] that read the branches, and the pooled."""
    assert head.pool is not None
    first = sum(head.widths[: head.pool.place])
    sizes = [first, head.pool.conv.out_channels, sum(head.widths) - first]
    if sizes[2] == 0:
        return weight.split(sizes[:2], 1)
    before, of_pooled, behind = weight.split(sizes, 1)
    return (behind if first == 0 else torch.cat([before, behind], 1)), of_pooled


def gives_channels_last(head: Head, x: Tensor) -> bool:
    """Whether the layers' own result would be channels_last: by its projection's weight, if it does
    not read such a map."""
    last = joins_channels_last(head, x)
    return last or (head.project is not None and is_channels_last(head.project.weight))


def joins_channels_last(head: Head, x: Tensor) -> bool:
    """Whether the branches' own maps, joined, would be. It matters to a dropout, which draws in the
    order of the memory.

    A concatenation is if all of its maps are, which the pooled map, spread over the plane, never
    is. A sum lies as the first of what it adds.
    """
    if head.pool is not None:
        return False
    last = branches_lie_channels_last(head, x)
    return last[0] if head.join == "sum" else all(last)


def branches_lie_channels_last(head: Head, x: Tensor) -> list[bool]:
    """The same of each branch's own map: its convolutions' weights and x decide."""
    last = is_channels_last(x)
    return [last or any(is_channels_last(c.weight) for c in _convs(b)) for b in head.branches]


def _convs(branch: Branch) -> list[Conv]:
    return [branch.conv] if branch.depthwise is None else [branch.depthwise, branch.conv]


POOL_BATCH_OF_ONE = ("error", "running_stats")


def check_pool_batch_of_one(value: str, op: str = "ASPP") -> str:
    """Return ``value``, or raise ValueError when it is not one of the two known policies."""
    if not isinstance(value, str) or value not in POOL_BATCH_OF_ONE:
        raise ValueError(
            f"{op}: pool_batch_of_one must be one of {POOL_BATCH_OF_ONE}, got {shown(value)}"
        )
    return value


def pooled_norm(head: Head) -> Norm | None:
    """The batch norm that sees one value per channel of a batch of one."""
    if head.pool is None:
        return None
    norm = next((s for s in head.pool.stages if is_batch_norm(s)), None)
    return norm  # type: ignore[return-value]


def single_pooled_value(head: Head, x: Tensor, pool_batch_of_one: str) -> bool:
    """Whether the pooled branch must use its running statistics; raises where it may not."""
    norm = pooled_norm(head)
    if norm is None or not norm.training or x.shape[0] != 1 or _synchronised(norm):
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
