# SPDX-License-Identifier: BSD-3-Clause
"""The ASPP module, with torchvision's structure and state-dict keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from aspp_ext.ops.checks import check_flag, check_int, check_number, shown

from .fused import FusedForward
from .head import Head, check_pool_batch_of_one
from .parts import describe_standard

Rate = int | tuple[int, int]


class ASPPConv(nn.Sequential):
    """A dense atrous branch."""

    def __init__(self, in_channels: int, out_channels: int, rate: Rate) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=rate, dilation=rate, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )


class SeparableConv2d(nn.Sequential):
    """A depthwise atrous convolution and a 1x1 convolution, nothing between."""

    def __init__(self, in_channels: int, out_channels: int, rate: Rate) -> None:
        filters = nn.Conv2d(
            in_channels,
            in_channels,
            3,
            padding=rate,
            dilation=rate,
            groups=in_channels,
            bias=False,
        )
        super().__init__(filters, nn.Conv2d(in_channels, out_channels, 1, bias=False))


class ASPPSeparableConv(nn.Sequential):
    """A separable atrous branch."""

    def __init__(self, in_channels: int, out_channels: int, rate: Rate) -> None:
        super().__init__(
            SeparableConv2d(in_channels, out_channels, rate),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )


class ASPPPooling(nn.Sequential):
    """The mean over the plane through a 1x1 convolution, stretched back over the plane."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        for module in self:
            x = module(x)
        return x.expand(-1, -1, height, width)


class LayeredASPP(nn.Module):
    """ASPP computed layer by layer: the structure of :class:`ASPP` without the fused forward."""

    def __init__(
        self,
        in_channels: int,
        atrous_rates: Sequence[Rate],
        out_channels: int = 256,
        *,
        separable: bool = False,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        branch = ASPPSeparableConv if separable else ASPPConv
        first = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        blocks: list[nn.Module] = [
            nn.Sequential(first, nn.BatchNorm2d(out_channels), nn.ReLU()),
            *(branch(in_channels, out_channels, rate) for rate in atrous_rates),
            ASPPPooling(in_channels, out_channels),
        ]
        self.convs = nn.ModuleList(blocks)
        self.project = nn.Sequential(
            nn.Conv2d(len(blocks) * out_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for conv in self.convs:
            outputs.append(conv(x))
        return self.project(torch.cat(outputs, 1))


class ASPP(FusedForward, LayeredASPP):
    """Atrous Spatial Pyramid Pooling, the DeepLab v3 head (arXiv 1706.05587).

    ``dropout(relu(norm(project(concat(branches, pooled)))))`` with branches
    ``relu(norm(conv(x)))``: one 1x1 convolution, one 3x3 convolution per atrous rate, and the
    image's mean through a 1x1 convolution, the same at every pixel.

    State-dict keys, their order, shapes and initial values are those of
    ``torchvision.models.segmentation.deeplabv3.ASPP``; with ``separable=True`` they are those of
    the separable ASPP of segmentation_models_pytorch. In eval mode without gradients the batch
    norms are folded into the weights; on the CPU once, and each call looks whether a parameter or
    buffer has changed, elsewhere in each call, unless :func:`aspp_ext.freeze` promises that none
    does.
    ``torch.jit.script`` compiles the layers one by one.

    Args:
        in_channels: C of the input [N, C, H, W].
        atrous_rates: rate of each 3x3 branch in pixels, int or (rate_h, rate_w), at least 1.
        out_channels: channels of each branch and of the output [N, out_channels, H, W].
        separable: depthwise 3x3 then 1x1 instead of a dense 3x3 in each atrous branch.
        dropout: probability of the dropout after the projection.
        pool_batch_of_one: a batch of one gives the pooled branch's batch norm one value per
            channel to train on. "error" raises as PyTorch does; "running_stats" normalises that
            branch with its running statistics, which stay as they are.
        polyphase: the CPU may compute the 3x3 branches by minimal filtering, which multiplies less
            and rounds a little more. In eval mode the weights prepared for it take several times
            the memory of the branches' weights for each size of x, up to 1 GiB in all or two
            sizes; False saves that.

    Raises:
        TypeError: a rate is not an int, or polyphase not a bool.
        ValueError: an argument out of range.
    """

    original = LayeredASPP

    def __init__(
        self,
        in_channels: int,
        atrous_rates: Sequence[Rate],
        out_channels: int = 256,
        *,
        separable: bool = False,
        dropout: float = 0.5,
        pool_batch_of_one: Literal["error", "running_stats"] = "error",
        polyphase: bool = True,
    ) -> None:
        in_channels = check_int("ASPP", "in_channels", in_channels)
        out_channels = check_int("ASPP", "out_channels", out_channels)
        rates = _checked_rates(atrous_rates)
        check_flag("ASPP", "separable", separable)
        check_number("ASPP", "dropout", dropout)
        if not 0 <= dropout <= 1:
            raise ValueError(f"ASPP: dropout must be from 0 to 1, got {dropout}")
        policy = check_pool_batch_of_one(pool_batch_of_one)
        check_flag("ASPP", "polyphase", polyphase)
        super().__init__(in_channels, rates, out_channels, separable=separable, dropout=dropout)
        self.pool_batch_of_one, self.polyphase = policy, polyphase

    @classmethod
    def describe(cls, module: nn.Module) -> Head:
        """Read the parts of ``module``; raises Unfusable when one was replaced."""
        return describe_standard(
            module,
            ASPPConv,
            ASPPPooling,
            separable_conv=ASPPSeparableConv,
            separable_pair=SeparableConv2d,
        )


def _checked_rates(atrous_rates: Sequence[Rate]) -> list[Rate]:
    if isinstance(atrous_rates, (str, bytes, Tensor)) or not isinstance(atrous_rates, Iterable):
        raise TypeError(f"ASPP: atrous_rates must be a list of rates, got {shown(atrous_rates)}")
    rates: list[Rate] = []
    for i, rate in enumerate(atrous_rates):
        pair = list(rate) if isinstance(rate, (list, tuple)) else [rate]
        if len(pair) != (2 if isinstance(rate, (list, tuple)) else 1):
            raise ValueError(f"ASPP: atrous_rates[{i}] must be an int or a pair, got {shown(rate)}")
        pair = [check_int("ASPP", f"atrous_rates[{i}]", r) for r in pair]
        rates.append((pair[0], pair[1]) if len(pair) == 2 else pair[0])
    if not rates:
        raise ValueError("ASPP: atrous_rates must name at least one rate, got none")
    return rates
