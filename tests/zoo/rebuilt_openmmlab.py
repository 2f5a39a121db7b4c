# SPDX-License-Identifier: BSD-3-Clause
"""The ASPP heads of the OpenMMLab family and of what is built on it, rebuilt from descriptions."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.zoo.case import ONE, Case

NORMS = {"BN": ("bn", nn.BatchNorm2d), "SyncBN": ("bn", nn.SyncBatchNorm)}
NORMS["GN"] = ("gn", lambda channels: nn.GroupNorm(4, channels))


class ConvModule(nn.Module):
    """mmcv: convolution, norm and activation in an order that is a setting."""

    def __init__(self, cin, cout, k, padding=0, dilation=1, groups=1, norm="SyncBN", act=True):
        super().__init__()
        self.order = ("conv", "norm", "act")
        self.with_norm, self.with_activation = norm is not None, act
        self.conv = nn.Conv2d(
            cin, cout, k, padding=padding, dilation=dilation, groups=groups, bias=norm is None
        )
        if norm is not None:
            self.norm_name, make = NORMS[norm]
            self.add_module(self.norm_name, make(cout))
        if act:
            self.activate = nn.ReLU(inplace=True)

    @property
    def norm(self):
        return getattr(self, self.norm_name)

    def forward(self, x):
        for step in self.order:
            if step == "conv":
                x = self.conv(x)
            elif step == "norm" and self.with_norm:
                x = self.norm(x)
            elif step == "act" and self.with_activation:
                x = self.activate(x)
        return x


class SeparableConvModule(nn.Module):
    """mmcv: norm and activation after the depthwise convolution as well."""

    def __init__(self, cin, cout, k, padding=0, dilation=1, norm="SyncBN"):
        super().__init__()
        self.depthwise_conv = ConvModule(cin, cin, k, padding, dilation, groups=cin, norm=norm)
        self.pointwise_conv = ConvModule(cin, cout, 1, norm=norm)

    def forward(self, x):
        return self.pointwise_conv(self.depthwise_conv(x))


class BranchList(nn.ModuleList):
    """One branch a dilation; a dilation of 1 is a 1x1 convolution."""

    def __init__(self, dilations, cin, width, norm, separable=False):
        super().__init__()
        self.dilations = dilations
        for dilation in dilations:
            if dilation == 1:
                self.append(ConvModule(cin, width, 1, norm=norm))
            elif separable:
                self.append(SeparableConvModule(cin, width, 3, dilation, dilation, norm))
            else:
                self.append(ConvModule(cin, width, 3, dilation, dilation, norm=norm))

    def forward(self, x):
        outs = []
        for module in self:
            outs.append(module(x))
        return outs


class ASPPHead(nn.Module):
    """mmsegmentation: a list of feature maps, the pooled branch first, a 3x3 bottleneck."""

    separable = False

    def __init__(
        self,
        in_channels=16,
        channels=8,
        num_classes=5,
        dilations=(1, 12, 24, 36),
        norm="SyncBN",
        align_corners=False,
        in_index=-1,
        dropout_ratio=0.1,
    ):
        super().__init__()
        self.in_index, self.align_corners = in_index, align_corners
        self.conv_seg = nn.Conv2d(channels, num_classes, kernel_size=1)
        self.dropout = nn.Dropout2d(dropout_ratio) if dropout_ratio > 0 else None
        self.image_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), ConvModule(in_channels, channels, 1, norm=norm)
        )
        self.aspp_modules = BranchList(dilations, in_channels, channels, norm, self.separable)
        self.bottleneck = ConvModule(
            (len(dilations) + 1) * channels, channels, 3, padding=1, norm=norm
        )

    def resize(self, x, size):
        return F.interpolate(x, size, mode="bilinear", align_corners=self.align_corners)

    def features(self, inputs):
        x = inputs[self.in_index]
        aspp_outs = [self.resize(self.image_pool(x), x.size()[2:])]
        aspp_outs.extend(self.aspp_modules(x))
        aspp_outs = torch.cat(aspp_outs, dim=1)
        return self.bottleneck(aspp_outs)

    def cls_seg(self, feat):
        if self.dropout is not None:
            feat = self.dropout(feat)
        return self.conv_seg(feat)

    def forward(self, inputs):
        return self.cls_seg(self.features(inputs))


class SeparableASPPHead(ASPPHead):
    """With a low-level feature map, as DeepLabV3+ has it."""

    separable = True

    def __init__(self, c1_in_channels=12, c1_channels=6, sep_bottleneck=False, **settings):
        super().__init__(**settings)
        channels, norm = self.conv_seg.in_channels, settings.get("norm", "SyncBN")
        self.c1_bottleneck = None
        if c1_in_channels > 0:
            self.c1_bottleneck = ConvModule(c1_in_channels, c1_channels, 1, norm=norm)
        else:
            c1_channels = 0
        if sep_bottleneck:
            cin = self.bottleneck.conv.in_channels
            self.bottleneck = SeparableConvModule(cin, channels, 3, padding=1, norm=norm)
        self.sep_bottleneck = nn.Sequential(
            SeparableConvModule(channels + c1_channels, channels, 3, padding=1, norm=norm),
            SeparableConvModule(channels, channels, 3, padding=1, norm=norm),
        )

    def forward(self, inputs):
        output = self.features(inputs)
        if self.c1_bottleneck is not None:
            c1_output = self.c1_bottleneck(inputs[0])
            output = self.resize(output, c1_output.shape[2:])
            output = torch.cat([output, c1_output], dim=1)
        return self.cls_seg(self.sep_bottleneck(output))


class ASPPWrapper(nn.Module):
    """DAFormer: the pooled branch is an option, so is a layer between."""

    def __init__(
        self, in_channels=16, channels=8, sep=False, dilations=(1, 6, 12, 18), pool=False, norm="BN"
    ):
        super().__init__()
        self.dilations = dilations
        self.image_pool = None
        if pool:
            self.image_pool = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), ConvModule(in_channels, channels, 1, norm=norm)
            )
        self.context_layer = None
        self.aspp_modules = BranchList(dilations, in_channels, channels, norm, separable=sep)
        count = len(dilations) + int(pool)
        self.bottleneck = ConvModule(count * channels, channels, 3, padding=1, norm=norm)

    def forward(self, x):
        aspp_outs = []
        if self.image_pool is not None:
            pooled = self.image_pool(x)
            aspp_outs.append(F.interpolate(pooled, x.size()[2:], mode="bilinear"))
        if self.context_layer is not None:
            x = self.context_layer(x)
        aspp_outs.extend(self.aspp_modules(x))
        return self.bottleneck(torch.cat(aspp_outs, dim=1))


class RecursiveNeckASPP(nn.Module):
    """DetectoRS: no norm; the last convolution reads the pooled map; nothing after the cat."""

    def __init__(self, in_channels=16, out_channels=4, dilations=(1, 3, 6, 1)):
        super().__init__()
        self.aspp = nn.ModuleList()
        for dilation in dilations:
            k = 3 if dilation > 1 else 1
            self.aspp.append(
                nn.Conv2d(
                    in_channels,
                    out_channels,
                    kernel_size=k,
                    dilation=dilation,
                    padding=dilation if dilation > 1 else 0,
                    bias=True,
                )
            )
        self.gap = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        avg_x = self.gap(x)
        out = []
        for i in range(len(self.aspp)):
            inp = avg_x if i == len(self.aspp) - 1 else x
            out.append(F.relu_(self.aspp[i](inp)))
        out[-1] = out[-1].expand_as(out[-2])
        return torch.cat(out, dim=1)


FEATURES = ((2, 12, 26, 30), (2, 16, 13, 15))

OPENMMLAB = {
    "mmseg": Case(ASPPHead, FEATURES, "pool first, 3x3 bottleneck, SyncBN", row=3, list_input=True),
    "mmseg_align_corners": Case(
        lambda: ASPPHead(align_corners=True, norm="BN", dilations=(1, 6, 12, 18)),
        FEATURES,
        "the settings of crops of 769",
        row=3,
        list_input=True,
    ),
    "mmseg_group_norm": Case(
        lambda: ASPPHead(norm="GN", dropout_ratio=0),
        FEATURES,
        "GroupNorm under the key gn; no dropout",
        row=3,
        list_input=True,
    ),
    "mmseg_no_norm": Case(
        lambda: ASPPHead(norm=None), FEATURES, "biases instead of norms", row=3, list_input=True
    ),
    "mmseg_separable": Case(
        SeparableASPPHead,
        FEATURES,
        "separable, norm and ReLU between; low-level map joined later",
        row=4,
        list_input=True,
    ),
    "mmseg_separable_bottleneck": Case(
        lambda: SeparableASPPHead(sep_bottleneck=True, norm="BN"),
        FEATURES,
        "a fork: the bottleneck is separable, too",
        row=4,
        list_input=True,
    ),
    "mmseg_separable_no_low_level": Case(
        lambda: SeparableASPPHead(c1_in_channels=0, dilations=(1, 2, 3, 6)),
        FEATURES,
        "separable without the low-level map",
        row=4,
        list_input=True,
    ),
    "daformer": Case(ASPPWrapper, ONE, "no pooled branch, 3x3 bottleneck", row=28),
    "daformer_separable": Case(
        lambda: ASPPWrapper(sep=True, pool=True), ONE, "separable, pool first", row=28
    ),
    "detectors": Case(
        RecursiveNeckASPP, ONE, "the last of equal convolutions reads the pooled map", row=29
    ),
}
