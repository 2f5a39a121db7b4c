# SPDX-License-Identifier: BSD-3-Clause
"""torchvision's ASPP and those that follow its layout, rebuilt from descriptions."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.zoo.case import ONE, Case


class ConvBranch(nn.Sequential):
    def __init__(self, cin, cout, rate, inplace=False):
        super().__init__(
            nn.Conv2d(cin, cout, 3, padding=rate, dilation=rate, bias=False),
            nn.BatchNorm2d(cout),
            nn.ReLU(inplace=inplace),
        )


class PoolingBranch(nn.Sequential):
    def __init__(self, cin, cout, inplace=False):
        super().__init__(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(cin, cout, 1, bias=False),
            nn.BatchNorm2d(cout),
            nn.ReLU(inplace=inplace),
        )

    def forward(self, x):
        height_width = x.shape[-2:]
        for layer in self:
            x = layer(x)
        return F.interpolate(x, size=height_width, mode="bilinear", align_corners=False)


class VisionASPP(nn.Module):
    """torchvision: any number of rates, convs.{i}, project."""

    def __init__(self, in_channels=16, atrous_rates=(12, 24, 36), out_channels=8, dropout=0.5):
        super().__init__()
        pointwise = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )
        atrous = [ConvBranch(in_channels, out_channels, rate) for rate in atrous_rates]
        pooling = PoolingBranch(in_channels, out_channels)
        self.convs = nn.ModuleList([pointwise, *atrous, pooling])
        self.project = nn.Sequential(
            nn.Conv2d(len(self.convs) * out_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Dropout(dropout),
        )

    def forward(self, x):
        results = []
        for conv in self.convs:
            results.append(conv(x))
        return self.project(torch.cat(results, dim=1))


class VisionHead(nn.Sequential):
    def __init__(self, in_channels=16, num_classes=5, width=8):
        super().__init__(
            VisionASPP(in_channels, (12, 24, 36), width),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, num_classes, 1),
        )


class MattingBase(nn.Module):
    """BackgroundMattingV2: torchvision's ASPP at rates 3, 6, 9 between an encoder and a decoder."""

    def __init__(self, width=8):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(6, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
        )
        self.aspp = VisionASPP(16, [3, 6, 9], width)
        self.decoder = nn.Conv2d(width + 6, 5, 3, padding=1)

    def forward(self, src, bgr):
        both = torch.cat([src, bgr], dim=1)
        x = self.aspp(self.backbone(both))
        x = F.interpolate(x, size=both.shape[2:], mode="bilinear", align_corners=False)
        x = self.decoder(torch.cat([x, both], dim=1))
        pha = x[:, 0:1].clamp_(0.0, 1.0)
        fgr = (src + x[:, 1:4]).clamp_(0.0, 1.0)
        return pha, fgr, F.relu(x[:, 4:])


class SeparableConv(nn.Sequential):
    """Depthwise and pointwise with nothing between."""

    def __init__(self, cin, cout, k, padding=0, dilation=1, bias=True, groups=None):
        super().__init__(
            nn.Conv2d(
                cin,
                cin,
                k,
                padding=padding,
                dilation=dilation,
                groups=cin if groups is None else groups,
                bias=False,
            ),
            nn.Conv2d(cin, cout, 1, bias=bias),
        )


class SmpConv(nn.Sequential):
    def __init__(self, cin, cout, rate, separable=False, groups=None):
        if separable:
            conv = SeparableConv(cin, cout, 3, rate, rate, bias=False, groups=groups)
        else:
            conv = nn.Conv2d(cin, cout, 3, padding=rate, dilation=rate, bias=False)
        super().__init__(conv, nn.BatchNorm2d(cout), nn.ReLU())


class SmpASPP(nn.Module):
    """segmentation_models.pytorch: exactly three rates."""

    def __init__(
        self,
        in_channels=16,
        out_channels=8,
        atrous_rates=(12, 24, 36),
        separable=False,
        dropout=0.5,
        groups=None,
    ):
        super().__init__()
        rate1, rate2, rate3 = tuple(atrous_rates)
        self.convs = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False),
                    nn.BatchNorm2d(out_channels),
                    nn.ReLU(),
                ),
                SmpConv(in_channels, out_channels, rate1, separable, groups),
                SmpConv(in_channels, out_channels, rate2, separable, groups),
                SmpConv(in_channels, out_channels, rate3, separable, groups),
                PoolingBranch(in_channels, out_channels),
            ]
        )
        self.project = nn.Sequential(
            nn.Conv2d(5 * out_channels, out_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Dropout(dropout),
        )

    def forward(self, x):
        res = [conv(x) for conv in self.convs]
        return self.project(torch.cat(res, dim=1))


class SmpPlusDecoder(nn.Module):
    """DeepLabV3+: the pyramid is the first of a Sequential, then upsampled by a factor."""

    def __init__(self, high=16, low=12, width=8, low_width=6):
        super().__init__()
        self.aspp = nn.Sequential(
            SmpASPP(high, width, (12, 24, 36), separable=True),
            SeparableConv(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.up = nn.UpsamplingBilinear2d(scale_factor=4)
        self.block1 = nn.Sequential(
            nn.Conv2d(low, low_width, 1, bias=False), nn.BatchNorm2d(low_width), nn.ReLU()
        )
        self.block2 = nn.Sequential(
            SeparableConv(low_width + width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )

    def forward(self, features):
        high = self.up(self.aspp(features[-1]))
        low = self.block1(features[-3])
        return self.block2(torch.cat([high, low], dim=1))


class VainASPP(nn.Module):
    """VainF: in-place activations, dropout .1."""

    def __init__(self, in_channels=16, atrous_rates=(6, 12, 18), out_channels=8):
        super().__init__()
        modules = [
            nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(inplace=True),
            )
        ]
        for rate in atrous_rates:
            modules.append(ConvBranch(in_channels, out_channels, rate, inplace=True))
        modules.append(PoolingBranch(in_channels, out_channels, inplace=True))
        self.convs = nn.ModuleList(modules)
        self.project = nn.Sequential(
            nn.Conv2d(len(modules) * out_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Dropout(0.1),
        )

    def forward(self, x):
        return self.project(torch.cat([conv(x) for conv in self.convs], dim=1))


class AtrousSeparable(nn.Module):
    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        cin, biased = conv.in_channels, conv.bias is not None
        self.body = nn.Sequential(
            nn.Conv2d(
                cin,
                cin,
                conv.kernel_size,
                padding=conv.padding,
                dilation=conv.dilation,
                bias=biased,
                groups=cin,
            ),
            nn.Conv2d(cin, conv.out_channels, 1, bias=biased),
        )

    def forward(self, x):
        return self.body(x)


def to_separable(module: nn.Module) -> nn.Module:
    """VainF's converter: every convolution wider than 1x1 becomes a separable one."""
    if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1:
        return AtrousSeparable(module)
    for name, child in module.named_children():
        setattr(module, name, to_separable(child))
    return module


def libtorch_separable() -> nn.Module:
    return SmpASPP(separable=True, groups=1)


PYRAMID_FEATURES = ((2, 12, 28, 36), (2, 16, 14, 18), (2, 16, 7, 9))

TORCHVISION = {
    "torchvision": Case(VisionASPP, ONE, "the layout that others follow", row=1),
    "torchvision_two_rates": Case(
        lambda: VisionASPP(16, (2, 5), 8), ONE, "two rates; any number is allowed", row=1
    ),
    "torchvision_head": Case(VisionHead, ONE, "first of a Sequential with the classifier", row=1),
    "smp": Case(SmpASPP, ONE, "exactly three rates", row=2),
    "smp_separable": Case(
        lambda: SmpASPP(separable=True), ONE, "separable, nothing between", row=2
    ),
    "smp_plus_decoder": Case(
        SmpPlusDecoder,
        PYRAMID_FEATURES,
        "the pyramid reads the last of a list; scale_factor ties two sizes",
        row=2,
        list_input=True,
    ),
    "vainf": Case(VainASPP, ONE, "ReLU in place, dropout .1", row=11),
    "vainf_separable": Case(
        lambda: to_separable(VainASPP()), ONE, "converted to separable: body.{0,1}", row=11
    ),
    "matting_v2": Case(
        MattingBase, ((2, 3, 26, 30), (2, 3, 26, 30)), "inside a model of two images", row=32
    ),
    "libtorch": Case(SmpASPP, ONE, "the dense form is torchvision's", row=36),
    "libtorch_separable": Case(
        libtorch_separable,
        ONE,
        "groups=1: 'separable' is a dense 3x3 and a 1x1 with nothing between",
        row=36,
    ),
}
