# SPDX-License-Identifier: BSD-3-Clause
"""ASPP modules of medical segmentation, and two dense chains, rebuilt from descriptions."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.zoo.case import ONE, Case


class ADN(nn.Sequential):
    """MONAI: norm and activation under the names N and A."""

    def __init__(self, channels):
        super().__init__()
        self.add_module("N", nn.BatchNorm2d(channels))
        self.add_module("A", nn.LeakyReLU())


class SimpleASPP(nn.Module):
    """MONAI: bare biased branches; one norm and activation after the 1x1 convolution."""

    def __init__(self, in_channels=16, width=4, kernel_sizes=(1, 3, 3, 3), dilations=(1, 2, 4, 6)):
        super().__init__()
        if len(kernel_sizes) != len(dilations):
            raise ValueError("as many kernel sizes as dilations")
        self.convs = nn.ModuleList()
        for k, d in zip(kernel_sizes, dilations, strict=True):
            padding = (k - 1) // 2 * d
            self.convs.append(nn.Conv2d(in_channels, width, k, dilation=d, padding=padding))
        out_channels = width * len(self.convs)
        self.conv_k1 = nn.Sequential()
        self.conv_k1.add_module("conv", nn.Conv2d(out_channels, out_channels, 1, bias=False))
        self.conv_k1.add_module("adn", ADN(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_out = torch.cat([conv(x) for conv in self.convs], dim=1)
        return self.conv_k1(x_out)


class DenseAsppBlock(nn.Sequential):
    """Norm and activation before each convolution."""

    def __init__(self, cin, mid, cout, rate, first_norm=True):
        super().__init__()
        if first_norm:
            self.add_module("norm1", nn.BatchNorm2d(cin, momentum=0.0003))
        self.add_module("relu1", nn.ReLU(inplace=first_norm))
        self.add_module("conv1", nn.Conv2d(cin, mid, 1))
        self.add_module("norm2", nn.BatchNorm2d(mid, momentum=0.0003))
        self.add_module("relu2", nn.ReLU(inplace=True))
        self.add_module("conv2", nn.Conv2d(mid, cout, 3, dilation=rate, padding=rate))

    def forward(self, x):
        return F.dropout2d(super().forward(x), p=0.1, training=self.training)


class DenseASPP(nn.Module):
    """Each block reads the results of all blocks before it."""

    def __init__(self, channels=16, mid=8, cout=4, rates=(3, 6, 12, 18, 24)):
        super().__init__()
        for i, rate in enumerate(rates):
            block = DenseAsppBlock(channels + i * cout, mid, cout, rate, first_norm=i > 0)
            setattr(self, f"ASPP_{rate}", block)
        self.rates = rates
        self.classification = nn.Conv2d(channels + len(rates) * cout, 5, 1)

    def forward(self, feature):
        for rate in self.rates:
            aspp = getattr(self, f"ASPP_{rate}")(feature)
            feature = torch.cat((aspp, feature), dim=1)
        return self.classification(feature)


class AtrousConv(nn.Sequential):
    """bts: an optional norm, ReLU, 1x1, norm, ReLU, atrous."""

    def __init__(self, cin, cout, dilation, apply_bn_first=True):
        super().__init__()
        self.atrous_conv = nn.Sequential()
        if apply_bn_first:
            self.atrous_conv.add_module("first_bn", nn.BatchNorm2d(cin, momentum=0.01, eps=1.1e-5))
        self.atrous_conv.add_module(
            "aconv_sequence",
            nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(cin, cout * 2, 1, bias=False),
                nn.BatchNorm2d(cout * 2, momentum=0.01),
                nn.ReLU(),
                nn.Conv2d(cout * 2, cout, 3, padding=dilation, dilation=dilation, bias=False),
            ),
        )

    def forward(self, x):
        return self.atrous_conv.forward(x)


class BtsDensePyramid(nn.Module):
    """bts: concatenations grow, and each atrous convolution reads the newest."""

    def __init__(self, cin=16, width=4):
        super().__init__()
        self.daspp_3 = AtrousConv(cin, width, 3, apply_bn_first=False)
        self.daspp_6 = AtrousConv(cin + width, width, 6)
        self.daspp_12 = AtrousConv(cin + 2 * width, width, 12)
        self.daspp_18 = AtrousConv(cin + 3 * width, width, 18)
        self.daspp_24 = AtrousConv(cin + 4 * width, width, 24)
        self.daspp_conv = nn.Sequential(
            nn.Conv2d(cin + 5 * width, width, 3, padding=1, bias=False), nn.ELU()
        )

    def forward(self, x):
        daspp_3 = self.daspp_3(x)
        concat4_2 = torch.cat([x, daspp_3], dim=1)
        daspp_6 = self.daspp_6(concat4_2)
        concat4_3 = torch.cat([concat4_2, daspp_6], dim=1)
        daspp_12 = self.daspp_12(concat4_3)
        concat4_4 = torch.cat([concat4_3, daspp_12], dim=1)
        daspp_18 = self.daspp_18(concat4_4)
        concat4_5 = torch.cat([concat4_4, daspp_18], dim=1)
        daspp_24 = self.daspp_24(concat4_5)
        everything = [x, daspp_3, daspp_6, daspp_12, daspp_18, daspp_24]
        return self.daspp_conv(torch.cat(everything, dim=1))


class DoubleUNetASPP(nn.Module):
    """A DoubleU-Net port: pool first, its 1x1 biased."""

    def __init__(self, in_c=16, out_c=4, rates=(6, 12, 18), pool_size=(1, 1), align=True):
        super().__init__()
        self.align = align

        def block(k, rate):
            return nn.Sequential(
                nn.Conv2d(in_c, out_c, k, padding=(k // 2) * rate, dilation=rate, bias=False),
                nn.BatchNorm2d(out_c),
                nn.ReLU(inplace=True),
            )

        self.avgpool = nn.Sequential(
            nn.AdaptiveAvgPool2d(pool_size),
            nn.Conv2d(in_c, out_c, kernel_size=1),
            nn.BatchNorm2d(out_c),
            nn.ReLU(inplace=True),
        )
        self.conv1 = block(1, 1)
        self.conv2 = block(3, rates[0])
        self.conv3 = block(3, rates[1])
        self.conv4 = block(3, rates[2])
        self.final = nn.Sequential(
            nn.Conv2d(out_c * 5, out_c, 1, bias=False), nn.BatchNorm2d(out_c), nn.ReLU()
        )

    def forward(self, x):
        x0 = self.avgpool(x)
        x0 = F.interpolate(x0, size=x.size()[2:], mode="bilinear", align_corners=self.align)
        x1 = self.conv1(x)
        x2 = self.conv2(x)
        x3 = self.conv3(x)
        x4 = self.conv4(x)
        return self.final(torch.cat([x0, x1, x2, x3, x4], dim=1))


class SharedNormASPP(nn.Module):
    """Another DoubleU-Net port: a single norm for four branches and the projection."""

    def __init__(self, in_channels=16, out_channels=4):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv1x1_pool = nn.Conv2d(in_channels, out_channels, 1)
        self.bn_pool = nn.BatchNorm2d(out_channels)
        self.conv1x1 = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.conv6 = nn.Conv2d(in_channels, out_channels, 3, padding=6, dilation=6, bias=False)
        self.conv12 = nn.Conv2d(in_channels, out_channels, 3, padding=12, dilation=12, bias=False)
        self.conv18 = nn.Conv2d(in_channels, out_channels, 3, padding=18, dilation=18, bias=False)
        self.out_conv = nn.Conv2d(out_channels * 5, out_channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()

    def forward(self, x):
        size = x.shape[2:]
        pool = self.relu(self.bn_pool(self.conv1x1_pool(self.avg_pool(x))))
        pool = F.interpolate(pool, size=size, mode="bilinear", align_corners=False)
        a = self.relu(self.bn(self.conv1x1(x)))
        b = self.relu(self.bn(self.conv6(x)))
        c = self.relu(self.bn(self.conv12(x)))
        d = self.relu(self.bn(self.conv18(x)))
        y = self.out_conv(torch.cat([pool, a, b, c, d], dim=1))
        return self.relu(self.bn(y))


class ResUNetPlusPlusASPP(nn.Module):
    """Convolution, ReLU, norm in this order; a bare projection; neither 1x1 nor pool."""

    def __init__(self, in_dims=16, out_dims=8, rate=(6, 12, 18)):
        super().__init__()

        def block(r):
            return nn.Sequential(
                nn.Conv2d(in_dims, out_dims, 3, stride=1, padding=r, dilation=r),
                nn.ReLU(inplace=True),
                nn.BatchNorm2d(out_dims),
            )

        self.aspp_block1 = block(rate[0])
        self.aspp_block2 = block(rate[1])
        self.aspp_block3 = block(rate[2])
        self.output = nn.Conv2d(len(rate) * out_dims, out_dims, 1)

    def forward(self, x):
        x1 = self.aspp_block1(x)
        x2 = self.aspp_block2(x)
        x3 = self.aspp_block3(x)
        return self.output(torch.cat([x1, x2, x3], dim=1))


class CopleASPP(nn.Module):
    """COPLE-Net: widths, kernels and dilations in lists; an activation after each branch."""

    def __init__(self, cin=16, widths=(2, 6, 4, 4), kernels=(1, 3, 3, 3), dilations=(1, 2, 4, 6)):
        super().__init__()
        self.conv_num = len(widths)
        assert self.conv_num == 4 == len(kernels) == len(dilations)
        pads = [int((k - 1) / 2 * d) for k, d in zip(kernels, dilations, strict=True)]
        self.conv_1 = nn.Conv2d(cin, widths[0], kernels[0], dilation=dilations[0], padding=pads[0])
        self.conv_2 = nn.Conv2d(cin, widths[1], kernels[1], dilation=dilations[1], padding=pads[1])
        self.conv_3 = nn.Conv2d(cin, widths[2], kernels[2], dilation=dilations[2], padding=pads[2])
        self.conv_4 = nn.Conv2d(cin, widths[3], kernels[3], dilation=dilations[3], padding=pads[3])
        out = sum(widths)
        self.conv_1x1 = nn.Sequential(nn.Conv2d(out, out, 1), nn.BatchNorm2d(out), nn.LeakyReLU())

    def forward(self, x):
        x1 = F.leaky_relu(self.conv_1(x))
        x2 = F.leaky_relu(self.conv_2(x))
        x3 = F.leaky_relu(self.conv_3(x))
        x4 = F.leaky_relu(self.conv_4(x))
        y = torch.cat([x1, x2, x3, x4], dim=1)
        return self.conv_1x1(y)


MEDICAL = {
    "monai": Case(SimpleASPP, ONE, "branches without norm or activation; 4C to 4C", row=15),
    "monai_kernels": Case(
        lambda: SimpleASPP(16, 4, (1, 3, 5), (1, 2, 3)), ONE, "three branches, a 5x5", row=15
    ),
    "dense_aspp": Case(DenseASPP, ONE, "a chain of concatenations", pyramid=False, row=20),
    "bts": Case(BtsDensePyramid, ONE, "a chain of concatenations", pyramid=False, row=21),
    "double_unet": Case(DoubleUNetASPP, ONE, "pool first, biased before its norm", row=33),
    "double_unet_pool_2x2": Case(
        lambda: DoubleUNetASPP(pool_size=(2, 2), align=False),
        ONE,
        "the pooled map is 2x2 and resized bilinearly",
        row=33,
    ),
    "double_unet_shared_norm": Case(
        SharedNormASPP, ONE, "a single BatchNorm, used five times", row=33
    ),
    "resunet": Case(ResUNetPlusPlusASPP, ONE, "ReLU before the norm; bare projection", row=34),
    "cople_net": Case(CopleASPP, ONE, "unequal widths, LeakyReLU without norm", row=35),
    "monai_cople_net": Case(
        lambda: SimpleASPP(16, 8), ONE, "row 15's module in row 35's network", row=35
    ),
}
