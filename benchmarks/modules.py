# SPDX-License-Identifier: BSD-3-Clause
"""The plain PyTorch modules that are timed against aspp_ext, and their aspp_ext counterparts.

`PlainASPP` has the layout and the state-dict keys of torchvision's ASPP (dense) and of
segmentation_models_pytorch's (separable), so that a benchmark needs neither package.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def atrous_conv(channels: int, out_channels: int, rate: int, separable: bool) -> nn.Module:
    if not separable:
        return nn.Conv2d(channels, out_channels, 3, padding=rate, dilation=rate, bias=False)
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=rate, dilation=rate, groups=channels, bias=False),
        nn.Conv2d(channels, out_channels, 1, bias=False),
    )


class PlainPooling(nn.Sequential):
    """Mean over the map, 1x1 convolution, BatchNorm, ReLU, stretched back over the map."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        for module in self:
            x = module(x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class PlainASPP(nn.Module):
    """ASPP as its users have it: branches, concatenation, projection. [N,C,H,W] -> [N,O,H,W]."""

    def __init__(
        self,
        channels: int,
        rates: Sequence[int],
        out_channels: int,
        separable: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        branches: list[nn.Module] = [
            nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(),
            )
        ]
        for rate in rates:
            branches.append(
                nn.Sequential(
                    atrous_conv(channels, out_channels, rate, separable),
                    nn.BatchNorm2d(out_channels),
                    nn.ReLU(),
                )
            )
        branches.append(PlainPooling(channels, out_channels))
        self.convs = nn.ModuleList(branches)
        self.project = nn.Sequential(
            nn.Conv2d(len(branches) * out_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Dropout(dropout),
        )
        self.options = {
            "in_channels": channels,
            "atrous_rates": tuple(rates),
            "out_channels": out_channels,
            "separable": separable,
            "dropout": dropout,
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.cat([branch(x) for branch in self.convs], dim=1))

    def to_ours(self) -> nn.Module:
        """The aspp_ext module with the same parameters (copied) in the same mode and dtype."""
        import aspp_ext

        ours = aspp_ext.ASPP(**self.options)
        ours.load_state_dict(self.state_dict(), strict=True)
        return ours.to(self.project[0].weight).train(self.training)


class PlainPyramid(nn.Module):
    """The operator alone: 1x1 and atrous branches and their concatenation.

    With `epilogue` each has a bias (BatchNorm folded) and a ReLU, as in inference; in training,
    where BatchNorm follows, they have neither.
    """

    def __init__(
        self,
        channels: int,
        rates: Sequence[int],
        out_channels: int,
        separable: bool,
        epilogue: bool = True,
    ) -> None:
        super().__init__()
        self.separable = separable
        self.epilogue = epilogue
        self.rates = [1, *rates]
        self.depthwise = nn.ModuleList()
        self.dense = nn.ModuleList([nn.Conv2d(channels, out_channels, 1, bias=epilogue)])
        for rate in rates:
            kernel = 1 if separable else 3
            geometry = {"padding": rate, "dilation": rate}
            if separable:
                self.depthwise.append(
                    nn.Conv2d(channels, channels, 3, groups=channels, bias=False, **geometry)
                )
                geometry = {}
            conv = nn.Conv2d(channels, out_channels, kernel, bias=epilogue, **geometry)
            self.dense.append(conv)

    def forward(self, x: Tensor) -> Tensor:
        inputs = [x, *(conv(x) for conv in self.depthwise)] if self.separable else None
        outputs = [conv(inputs[place] if inputs else x) for place, conv in enumerate(self.dense)]
        if self.epilogue:
            outputs = [F.relu(y) for y in outputs]
        return torch.cat(outputs, dim=1)

    def to_ours(self) -> nn.Module:
        """The same weights behind `atrous_pyramid` or `atrous_separable_pyramid`."""
        return OurPyramid(copy.deepcopy(self)).train(self.training)


class OurPyramid(nn.Module):
    """One call of the aspp_ext operator with the weights of a `PlainPyramid`."""

    def __init__(self, plain: PlainPyramid) -> None:
        super().__init__()
        self.plain = plain
        if plain.epilogue:
            self.register_buffer("shift", torch.cat([conv.bias.detach() for conv in plain.dense]))

    def forward(self, x: Tensor) -> Tensor:
        import aspp_ext

        plain = self.plain
        weights = [conv.weight for conv in plain.dense]
        epilogue = {"shift": self.shift, "activation": "relu"} if plain.epilogue else {}
        if not plain.separable:
            return aspp_ext.atrous_pyramid(x, weights, plain.rates, **epilogue)
        depthwise = [None, *(conv.weight for conv in plain.depthwise)]
        return aspp_ext.atrous_separable_pyramid(x, depthwise, weights, plain.rates, **epilogue)


def avoid_kinks(module: nn.Module) -> nn.Module:
    """Gives BatchNorms in training biases of +8 or -8: no value comes near the kink of ReLU.

    There one rounding decides whether a whole gradient passes, and the largest error of any two
    implementations is a matter of luck. Half the channels are always on, half always off.
    """
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.0)
            norm.bias.data = 16.0 * torch.randint(0, 2, norm.bias.shape) - 8.0
    return module


def randomise_norms(module: nn.Module) -> nn.Module:
    """Gives every BatchNorm random statistics and affine parameters, so that folding matters."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.2, 1.0)
    return module
