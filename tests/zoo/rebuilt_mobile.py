# SPDX-License-Identifier: BSD-3-Clause
"""The heads of transformers' mobile models and of ml-cvnets, rebuilt from descriptions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.zoo.case import ONE, Case


@dataclass
class MobileConfig:
    channels: int = 16
    aspp_out_channels: int = 8
    atrous_rates: tuple[int, ...] = (6, 12, 18)
    aspp_dropout_prob: float = 0.1
    num_labels: int = 5
    eps: float = 1e-5
    momentum: float = 0.1


class ConvLayer(nn.Module):
    """transformers: convolution, normalization, activation; the last two may be None."""

    def __init__(self, config, cin, cout, k, dilation=1, bias=False, norm=True, act=True):
        super().__init__()
        padding = int((k - 1) / 2) * dilation
        self.convolution = nn.Conv2d(cin, cout, k, padding=padding, dilation=dilation, bias=bias)
        self.normalization = None
        if norm:
            self.normalization = nn.BatchNorm2d(cout, eps=config.eps, momentum=config.momentum)
        self.activation = nn.ReLU() if act else None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = self.convolution(features)
        if self.normalization is not None:
            features = self.normalization(features)
        if self.activation is not None:
            features = self.activation(features)
        return features


class MobilePooling(nn.Module):
    def __init__(self, config, cin, cout):
        super().__init__()
        self.global_pool = nn.AdaptiveAvgPool2d(output_size=1)
        self.conv_1x1 = ConvLayer(config, cin, cout, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        spatial_size = features.shape[-2:]
        features = self.conv_1x1(self.global_pool(features))
        return F.interpolate(features, size=spatial_size, mode="bilinear", align_corners=False)


class MobileViTASPP(nn.Module):
    def __init__(self, config: MobileConfig):
        super().__init__()
        cin, cout = config.channels, config.aspp_out_channels
        if len(config.atrous_rates) != 3:
            raise ValueError("expected 3 rates")
        self.convs = nn.ModuleList([ConvLayer(config, cin, cout, 1)])
        self.convs.extend([ConvLayer(config, cin, cout, 3, r) for r in config.atrous_rates])
        self.convs.append(MobilePooling(config, cin, cout))
        self.project = ConvLayer(config, 5 * cout, cout, 1)
        self.dropout = nn.Dropout(p=config.aspp_dropout_prob)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        pyramid = []
        for conv in self.convs:
            pyramid.append(conv(features))
        pyramid = torch.cat(pyramid, dim=1)
        return self.dropout(self.project(pyramid))


class MobileViTV2ASPP(MobileViTASPP):
    """The second version is the same at other widths."""


class MobileViTHead(nn.Module):
    """Reads the last of the hidden states."""

    aspp_class = MobileViTASPP

    def __init__(self, config: MobileConfig | None = None):
        super().__init__()
        config = config or MobileConfig()
        self.aspp = self.aspp_class(config)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = ConvLayer(
            config, config.aspp_out_channels, config.num_labels, 1, bias=True, norm=False, act=False
        )

    def forward(self, hidden_states: list[torch.Tensor]) -> torch.Tensor:
        features = self.aspp(hidden_states[-1])
        return self.classifier(self.dropout(features))


class MobileViTV2Head(MobileViTHead):
    aspp_class = MobileViTV2ASPP


class MobileNetV2Head(nn.Module):
    """A 1x1 branch and a pooled one: no atrous convolution at all."""

    def __init__(self, config: MobileConfig | None = None):
        super().__init__()
        config = config or MobileConfig(momentum=0.997)
        cin, cout = config.channels, config.aspp_out_channels
        self.avg_pool = nn.AdaptiveAvgPool2d(output_size=1)
        self.conv_pool = ConvLayer(config, cin, cout, 1)
        self.conv_aspp = ConvLayer(config, cin, cout, 1)
        self.conv_projection = ConvLayer(config, 2 * cout, cout, 1)
        self.dropout = nn.Dropout2d(0.8)
        self.classifier = ConvLayer(
            config, cout, config.num_labels, 1, bias=True, norm=False, act=False
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        spatial_size = features.shape[-2:]
        pooled = self.conv_pool(self.avg_pool(features))
        pooled = F.interpolate(pooled, size=spatial_size, mode="bilinear", align_corners=True)
        features = torch.cat([pooled, self.conv_aspp(features)], dim=1)
        return self.classifier(self.dropout(self.conv_projection(features)))


class CvConv(nn.Module):
    """ml-cvnets: a block whose parts have names."""

    def __init__(self, cin, cout, k, dilation=1, groups=1, act=True):
        super().__init__()
        block = nn.Sequential()
        padding = (k - 1) // 2 * dilation
        block.add_module(
            "conv",
            nn.Conv2d(cin, cout, k, 1, padding, dilation=dilation, groups=groups, bias=False),
        )
        block.add_module("norm", nn.BatchNorm2d(cout))
        if act:
            block.add_module("act", nn.SiLU())
        self.block = block

    def forward(self, x):
        return self.block(x)


class CvSeparable(nn.Module):
    def __init__(self, cin, cout, dilation):
        super().__init__()
        self.dw_conv = CvConv(cin, cin, 3, dilation, groups=cin, act=False)
        self.pw_conv = CvConv(cin, cout, 1)

    def forward(self, x):
        return self.pw_conv(self.dw_conv(x))


class GlobalPool(nn.Module):
    def forward(self, x):
        return torch.mean(x, dim=[-2, -1], keepdim=True)


class CvPooling(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.aspp_pool = nn.Sequential()
        self.aspp_pool.add_module("global_pool", GlobalPool())
        self.aspp_pool.add_module("conv_1x1", CvConv(cin, cout, 1))

    def forward(self, x):
        x_size = x.shape[-2:]
        return F.interpolate(self.aspp_pool(x), x_size, mode="bilinear", align_corners=False)


class CvASPP(nn.Module):
    def __init__(self, cin=16, cout=8, rates=(2, 3, 6), is_sep_conv=False, dropout=0.0):
        super().__init__()
        branch = CvSeparable if is_sep_conv else lambda i, o, r: CvConv(i, o, 3, r)
        modules = [CvConv(cin, cout, 1)]
        modules.extend([branch(cin, cout, rate) for rate in rates])
        modules.append(CvPooling(cin, cout))
        self.convs = nn.ModuleList(modules)
        self.project = CvConv(5 * cout, cout, 1)
        self.dropout_layer = nn.Dropout2d(p=dropout)

    def forward(self, x, *args, **kwargs):
        out = [conv(x) for conv in self.convs]
        return self.dropout_layer(self.project(torch.cat(out, dim=1)))


HIDDEN = ((2, 8, 26, 30), (2, 16, 13, 15))

MOBILE = {
    "mobilevit": Case(
        lambda: MobileViTASPP(MobileConfig()), ONE, "optional parts of a layer", row=7
    ),
    "mobilevit_head": Case(
        MobileViTHead, HIDDEN, "the last of a list, then the classifier", row=7, list_input=True
    ),
    "mobilevitv2_head": Case(
        lambda: MobileViTV2Head(MobileConfig(channels=16, aspp_out_channels=16)),
        HIDDEN,
        "a subclass that inherits everything",
        row=8,
        list_input=True,
    ),
    "mobilenetv2_head": Case(
        MobileNetV2Head, ONE, "pooled branch and a 1x1: no atrous branch", pyramid=False, row=9
    ),
    "cvnets": Case(
        CvASPP, ONE, "mean() for pooling, SiLU, Dropout2d of 0, spare arguments", row=10
    ),
    "cvnets_separable": Case(
        lambda: CvASPP(is_sep_conv=True, dropout=0.2),
        ONE,
        "separable, here with a norm between, which is a guess",
        row=10,
    ),
}
