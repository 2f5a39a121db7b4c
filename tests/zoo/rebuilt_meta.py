# SPDX-License-Identifier: BSD-3-Clause
"""Detectron2's ASPP, DensePose's and Panoptic-DeepLab's, rebuilt from descriptions."""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.zoo.case import ONE, Case


def get_norm(kind, channels):
    if kind == "":
        return None
    if kind == "GN":
        return nn.GroupNorm(4, channels)
    return {"BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm}[kind](channels)


class ConvNormAct(nn.Conv2d):
    """Detectron2's convolution: norm and activation belong to it."""

    def __init__(self, *args, norm=None, activation=None, **settings):
        super().__init__(*args, **settings)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        x = F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


class SeparableConvNormAct(nn.Module):
    def __init__(self, cin, cout, k, padding, dilation, norm, activation):
        super().__init__()
        self.depthwise = ConvNormAct(
            cin,
            cin,
            k,
            padding=padding,
            dilation=dilation,
            groups=cin,
            bias=norm == "",
            norm=get_norm(norm, cin),
            activation=deepcopy(activation),
        )
        self.pointwise = ConvNormAct(
            cin,
            cout,
            1,
            bias=norm == "",
            norm=get_norm(norm, cout),
            activation=deepcopy(activation),
        )

    def forward(self, x):
        return self.pointwise(self.depthwise(x))


class Detectron2ASPP(nn.Module):
    """No norm in the pooled branch, a function as activation, functional dropout."""

    def __init__(
        self,
        in_channels=16,
        out_channels=8,
        dilations=(6, 12, 18),
        *,
        norm="BN",
        activation=F.relu,
        pool_kernel_size=None,
        dropout=0.1,
        use_depthwise_separable_conv=False,
    ):
        super().__init__()
        assert len(dilations) == 3
        self.pool_kernel_size, self.dropout = pool_kernel_size, dropout
        bias = norm == ""
        self.convs = nn.ModuleList()
        self.convs.append(
            ConvNormAct(
                in_channels,
                out_channels,
                1,
                bias=bias,
                norm=get_norm(norm, out_channels),
                activation=deepcopy(activation),
            )
        )
        for d in dilations:
            if use_depthwise_separable_conv:
                conv = SeparableConvNormAct(in_channels, out_channels, 3, d, d, norm, activation)
            else:
                conv = ConvNormAct(
                    in_channels,
                    out_channels,
                    3,
                    padding=d,
                    dilation=d,
                    bias=bias,
                    norm=get_norm(norm, out_channels),
                    activation=deepcopy(activation),
                )
            self.convs.append(conv)
        if pool_kernel_size is None:
            pool = nn.AdaptiveAvgPool2d((1, 1))
        else:
            pool = nn.AvgPool2d(kernel_size=pool_kernel_size, stride=1)
        self.convs.append(
            nn.Sequential(
                pool,
                ConvNormAct(in_channels, out_channels, 1, activation=deepcopy(activation)),
            )
        )
        self.project = ConvNormAct(
            5 * out_channels,
            out_channels,
            1,
            bias=bias,
            norm=get_norm(norm, out_channels),
            activation=deepcopy(activation),
        )

    def forward(self, x):
        size = x.shape[-2:]
        if self.pool_kernel_size is not None and (
            size[0] % self.pool_kernel_size[0] or size[1] % self.pool_kernel_size[1]
        ):
            raise ValueError(f"{self.pool_kernel_size} does not divide {size}")
        res = [conv(x) for conv in self.convs]
        res[-1] = F.interpolate(res[-1], size=size, mode="bilinear", align_corners=False)
        res = self.project(torch.cat(res, dim=1))
        return F.dropout(res, self.dropout, training=self.training) if self.dropout > 0 else res


class DensePoseConv(nn.Sequential):
    def __init__(self, cin, cout, dilation):
        super().__init__(
            nn.Conv2d(cin, cout, 3, padding=dilation, dilation=dilation, bias=False),
            nn.GroupNorm(4, cout),
            nn.ReLU(),
        )


class DensePosePooling(nn.Sequential):
    def __init__(self, cin, cout):
        super().__init__(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(cin, cout, 1, bias=False),
            nn.GroupNorm(4, cout),
            nn.ReLU(),
        )

    def forward(self, x):
        size = x.shape[-2:]
        return F.interpolate(super().forward(x), size=size, mode="bilinear", align_corners=False)


class DensePoseASPP(nn.Module):
    """GroupNorm in branches, a projection without norm and dropout."""

    def __init__(self, in_channels=16, atrous_rates=(6, 12, 56), out_channels=8):
        super().__init__()
        modules = [
            nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False),
                nn.GroupNorm(4, out_channels),
                nn.ReLU(),
            )
        ]
        rate1, rate2, rate3 = tuple(atrous_rates)
        modules.append(DensePoseConv(in_channels, out_channels, rate1))
        modules.append(DensePoseConv(in_channels, out_channels, rate2))
        modules.append(DensePoseConv(in_channels, out_channels, rate3))
        modules.append(DensePosePooling(in_channels, out_channels))
        self.convs = nn.ModuleList(modules)
        self.project = nn.Sequential(
            nn.Conv2d(5 * out_channels, out_channels, 1, bias=False), nn.ReLU()
        )

    def forward(self, x):
        res = []
        for conv in self.convs:
            res.append(conv(x))
        res = torch.cat(res, dim=1)
        return self.project(res)


class PanopticPooling(nn.Module):
    """Its pooling can be exchanged for one of a fixed window."""

    def __init__(self, cin, cout):
        super().__init__()
        self.aspp_pooling = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(cin, cout, 1, bias=False), nn.ReLU()
        )

    def set_image_pooling(self, pool_size):
        if pool_size is None:
            self.aspp_pooling[0] = nn.AdaptiveAvgPool2d(1)
        else:
            self.aspp_pooling[0] = nn.AvgPool2d(kernel_size=pool_size, stride=1)

    def forward(self, x):
        size = x.shape[-2:]
        x = self.aspp_pooling(x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class PanopticASPP(nn.Module):
    """Panoptic-DeepLab: convs.4.aspp_pooling has neither bias nor norm."""

    def __init__(self, in_channels=16, out_channels=8, atrous_rates=(3, 6, 9), pool_size=None):
        super().__init__()
        rate1, rate2, rate3 = atrous_rates
        pooling = PanopticPooling(in_channels, out_channels)
        pooling.set_image_pooling(pool_size)

        def unit(k, rate):
            return nn.Sequential(
                nn.Conv2d(in_channels, out_channels, k, 1, (k // 2) * rate, rate, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(),
            )

        self.convs = nn.ModuleList(
            [unit(1, 1), unit(3, rate1), unit(3, rate2), unit(3, rate3), pooling]
        )
        self.project = nn.Sequential(
            nn.Conv2d(5 * out_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Dropout(0.5),
        )

    def forward(self, x):
        res = [conv(x) for conv in self.convs]
        return self.project(torch.cat(res, dim=1))


META = {
    "detectron2": Case(
        Detectron2ASPP, ONE, "norm inside a Conv2d subclass; pooled branch biased, no norm", row=5
    ),
    "detectron2_separable": Case(
        lambda: Detectron2ASPP(use_depthwise_separable_conv=True, norm="SyncBN"),
        ONE,
        "separable, norm and activation between",
        row=5,
    ),
    "detectron2_no_norm": Case(
        lambda: Detectron2ASPP(norm="", dropout=0.0), ONE, "biases everywhere, no norm", row=5
    ),
    "detectron2_prelu": Case(
        lambda: Detectron2ASPP(norm="GN", activation=nn.PReLU()),
        ONE,
        "PReLU, a copy for each convolution",
        row=5,
    ),
    "detectron2_pool_window": Case(
        lambda: Detectron2ASPP(pool_kernel_size=(6, 7)),
        ((2, 16, 12, 14),),
        "the pooled map is 7x8 and resized bilinearly; sizes have to be divisible",
        row=5,
    ),
    "densepose": Case(DensePoseASPP, ONE, "GroupNorm; projection and ReLU without norm", row=6),
    "panoptic_deeplab": Case(PanopticASPP, ONE, "pooled branch: no bias, no norm", row=26),
    "panoptic_deeplab_pool_window": Case(
        lambda: PanopticASPP(pool_size=(11, 13)),
        ONE,
        "the pooled map is 3x3 and resized bilinearly",
        row=26,
    ),
}
