# SPDX-License-Identifier: BSD-3-Clause
"""ASPP modules of well-known repositories of single authors, rebuilt from descriptions."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.zoo.case import ONE, Case


class AtrousUnit(nn.Module):
    """jfzhang95: atrous_conv, bn, relu; kaiming_normal weights."""

    def __init__(self, inplanes, planes, kernel_size, padding, dilation, norm):
        super().__init__()
        self.atrous_conv = nn.Conv2d(
            inplanes,
            planes,
            kernel_size=kernel_size,
            stride=1,
            padding=padding,
            dilation=dilation,
            bias=False,
        )
        self.bn = norm(planes)
        self.relu = nn.ReLU()
        nn.init.kaiming_normal_(self.atrous_conv.weight)

    def forward(self, x):
        x = self.atrous_conv(x)
        x = self.bn(x)
        return self.relu(x)


class XceptionASPP(nn.Module):
    """jfzhang95: branches and tail as attributes."""

    def __init__(self, inplanes=16, planes=8, output_stride=16, norm=nn.BatchNorm2d):
        super().__init__()
        if output_stride == 16:
            dilations = [1, 6, 12, 18]
        elif output_stride == 8:
            dilations = [1, 12, 24, 36]
        else:
            raise NotImplementedError
        self.aspp1 = AtrousUnit(inplanes, planes, 1, 0, dilations[0], norm)
        self.aspp2 = AtrousUnit(inplanes, planes, 3, dilations[1], dilations[1], norm)
        self.aspp3 = AtrousUnit(inplanes, planes, 3, dilations[2], dilations[2], norm)
        self.aspp4 = AtrousUnit(inplanes, planes, 3, dilations[3], dilations[3], norm)
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d((1, 1)),
            nn.Conv2d(inplanes, planes, 1, stride=1, bias=False),
            norm(planes),
            nn.ReLU(),
        )
        self.conv1 = nn.Conv2d(5 * planes, planes, 1, bias=False)
        self.bn1 = norm(planes)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        x1 = self.aspp1(x)
        x2 = self.aspp2(x)
        x3 = self.aspp3(x)
        x4 = self.aspp4(x)
        x5 = self.global_avg_pool(x)
        x5 = F.interpolate(x5, size=x4.size()[2:], mode="bilinear", align_corners=True)
        x = torch.cat((x1, x2, x3, x4, x5), dim=1)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.dropout(x)


class BevASPP(XceptionASPP):
    """BEVDepth: a copy for camera features; here it inherits its forward."""

    def __init__(self, inplanes=16, mid_channels=12):
        super().__init__(inplanes, mid_channels)


class Deeplab2ASPP(nn.Module):
    """kazuto1011, DeepLab v2: c0 to c3, biased, summed, straight to the classes."""

    def __init__(self, in_ch=16, out_ch=5, rates=(6, 12, 18, 24)):
        super().__init__()
        for i, rate in enumerate(rates):
            conv = nn.Conv2d(in_ch, out_ch, 3, 1, padding=rate, dilation=rate, bias=True)
            self.add_module(f"c{i}", conv)
        for m in self.children():
            nn.init.normal_(m.weight, mean=0, std=0.01)
            nn.init.constant_(m.bias, 0)

    def forward(self, x):
        return sum([stage(x) for stage in self.children()])


class EarlyReturn(nn.Module):
    """Ports of DeepLab v2: a return inside the loop, so two of four convolutions take part."""

    def __init__(self, inplanes=16, num_classes=5, rates=(6, 12, 18, 24)):
        super().__init__()
        self.conv2d_list = nn.ModuleList()
        for r in rates:
            self.conv2d_list.append(nn.Conv2d(inplanes, num_classes, 3, 1, r, r, bias=True))
        for m in self.conv2d_list:
            m.weight.data.normal_(0, 0.01)

    def forward(self, x):
        out = self.conv2d_list[0](x)
        for i in range(len(self.conv2d_list) - 1):
            out += self.conv2d_list[i + 1](x)
            return out


class ConvBnReLU(nn.Sequential):
    def __init__(self, cin, cout, k, padding, dilation):
        super().__init__()
        self.add_module("conv", nn.Conv2d(cin, cout, k, 1, padding, dilation, bias=False))
        self.add_module("bn", nn.BatchNorm2d(cout, eps=1e-5, momentum=1e-3))
        self.add_module("relu", nn.ReLU())


class ImagePool(nn.Module):
    def __init__(self, in_ch, out_ch):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.conv = ConvBnReLU(in_ch, out_ch, 1, 0, 1)

    def forward(self, x):
        _, _, H, W = x.shape
        h = self.conv(self.pool(x))
        return F.interpolate(h, size=(H, W), mode="bilinear", align_corners=False)


class Deeplab3ASPP(nn.Module):
    """kazuto1011, DeepLab v3: a module of stages, no projection of its own."""

    def __init__(self, in_ch=16, out_ch=8, rates=(6, 12, 18)):
        super().__init__()
        self.stages = nn.Module()
        self.stages.add_module("c0", ConvBnReLU(in_ch, out_ch, 1, 0, 1))
        for i, rate in enumerate(rates):
            self.stages.add_module(f"c{i + 1}", ConvBnReLU(in_ch, out_ch, 3, rate, rate))
        self.stages.add_module("imagepool", ImagePool(in_ch, out_ch))

    def forward(self, x):
        return torch.cat([stage(x) for stage in self.stages.children()], dim=1)


class Deeplab3Tail(nn.Sequential):
    def __init__(self, in_ch=16, out_ch=8, n_classes=5):
        super().__init__()
        self.add_module("aspp", Deeplab3ASPP(in_ch, out_ch))
        self.add_module("fc1", ConvBnReLU(5 * out_ch, out_ch, 1, 0, 1))
        self.add_module("fc2", nn.Conv2d(out_ch, n_classes, kernel_size=1))


class BiasedASPP(nn.Module):
    """bubbliiiing and YudeWang: biases before every norm, the mean in two steps."""

    def __init__(self, dim_in=16, dim_out=8, rate=1, bn_mom=0.1):
        super().__init__()
        for i, (k, r) in enumerate([(1, 1), (3, 6), (3, 12), (3, 18)], 1):
            dilation = r if k == 1 else r * rate
            branch = nn.Sequential(
                nn.Conv2d(dim_in, dim_out, k, 1, (k // 2) * dilation, dilation, bias=True),
                nn.BatchNorm2d(dim_out, momentum=bn_mom),
                nn.ReLU(inplace=True),
            )
            setattr(self, f"branch{i}", branch)
        self.branch5_conv = nn.Conv2d(dim_in, dim_out, 1, 1, 0, bias=True)
        self.branch5_bn = nn.BatchNorm2d(dim_out, momentum=bn_mom)
        self.branch5_relu = nn.ReLU(inplace=True)
        self.conv_cat = nn.Sequential(
            nn.Conv2d(dim_out * 5, dim_out, 1, 1, padding=0, bias=True),
            nn.BatchNorm2d(dim_out, momentum=bn_mom),
            nn.ReLU(inplace=True),
        )

    def forward(self, x):
        [_, _, row, col] = x.size()
        conv1x1 = self.branch1(x)
        conv3x3_1 = self.branch2(x)
        conv3x3_2 = self.branch3(x)
        conv3x3_3 = self.branch4(x)
        g = torch.mean(x, 2, True)
        g = torch.mean(g, 3, True)
        g = self.branch5_relu(self.branch5_bn(self.branch5_conv(g)))
        g = F.interpolate(g, (row, col), None, "bilinear", True)
        feature_cat = torch.cat([conv1x1, conv3x3_1, conv3x3_2, conv3x3_3, g], dim=1)
        return self.conv_cat(feature_cat)


def encoding_conv(cin, cout, rate, norm_layer):
    return nn.Sequential(
        nn.Conv2d(cin, cout, 3, padding=rate, dilation=rate, bias=False),
        norm_layer(cout),
        nn.ReLU(True),
    )


class GapBranch(nn.Module):
    def __init__(self, cin, cout, norm_layer, align_corners):
        super().__init__()
        self.align_corners = align_corners
        self.gap = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(cin, cout, 1, bias=False),
            norm_layer(cout),
            nn.ReLU(True),
        )

    def forward(self, x):
        _, _, h, w = x.size()
        pool = self.gap(x)
        return F.interpolate(pool, (h, w), mode="bilinear", align_corners=self.align_corners)


class EncodingASPP(nn.Module):
    """PyTorch-Encoding and UniMatch: b0 to b4, an eighth of the channels, Dropout2d or none."""

    def __init__(self, cin=32, rates=(12, 24, 36), norm=nn.BatchNorm2d, align=True, dropout=0.5):
        super().__init__()
        width = cin // 8
        self.b0 = nn.Sequential(nn.Conv2d(cin, width, 1, bias=False), norm(width), nn.ReLU(True))
        self.b1, self.b2, self.b3 = (encoding_conv(cin, width, rate, norm) for rate in rates)
        self.b4 = GapBranch(cin, width, norm, align)
        tail = [nn.Conv2d(5 * width, width, 1, bias=False), norm(width), nn.ReLU(True)]
        if dropout:
            tail.append(nn.Dropout2d(dropout, False))
        self.project = nn.Sequential(*tail)

    def forward(self, x):
        feats = (self.b0(x), self.b1(x), self.b2(x), self.b3(x), self.b4(x))
        return self.project(torch.cat(feats, 1))


class TramacConv(nn.Module):
    def __init__(self, cin, cout, rate):
        super().__init__()
        self.block = encoding_conv(cin, cout, rate, nn.BatchNorm2d)

    def forward(self, x):
        return self.block(x)


class TramacASPP(nn.Module):
    """Tramac: as above, a module deeper, at a fixed width."""

    def __init__(self, cin=16, width=8, atrous_rates=(12, 24, 36)):
        super().__init__()
        self.b0 = nn.Sequential(
            nn.Conv2d(cin, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)
        )
        rate1, rate2, rate3 = tuple(atrous_rates)
        self.b1 = TramacConv(cin, width, rate1)
        self.b2 = TramacConv(cin, width, rate2)
        self.b3 = TramacConv(cin, width, rate3)
        self.b4 = GapBranch(cin, width, nn.BatchNorm2d, True)
        self.project = nn.Sequential(
            nn.Conv2d(5 * width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
            nn.Dropout(0.5),
        )

    def forward(self, x):
        x = torch.cat([b(x) for b in (self.b0, self.b1, self.b2, self.b3, self.b4)], dim=1)
        return self.project(x)


GITHUB = {
    "jfzhang95": Case(XceptionASPP, ONE, "attributes; align_corners=True", row=12),
    "jfzhang95_sync_bn": Case(
        lambda: XceptionASPP(output_stride=8, norm=nn.SyncBatchNorm), ONE, "SyncBN", row=12
    ),
    "kazuto1011_v2": Case(Deeplab2ASPP, ONE, "biased, summed by sum() over children()", row=13),
    "kazuto1011_v2_early_return": Case(
        EarlyReturn, ONE, "only two of four convolutions are ever used", row=13
    ),
    "kazuto1011_v3": Case(Deeplab3ASPP, ONE, "ends with the concatenation", row=14),
    "kazuto1011_v3_tail": Case(
        Deeplab3Tail, ONE, "the projection is a module after the pyramid", row=14
    ),
    "bubbliiiing": Case(BiasedASPP, ONE, "biases and norms; mean in two steps", row=22),
    "encoding": Case(
        lambda: EncodingASPP(norm=nn.SyncBatchNorm),
        ((2, 32, 13, 15),),
        "an eighth of the channels; Dropout2d",
        row=23,
    ),
    "tramac": Case(TramacASPP, ONE, "b1.block.0", row=24),
    "unimatch": Case(
        lambda: EncodingASPP(rates=(6, 12, 18), dropout=None),
        ((2, 32, 13, 15),),
        "an eighth of the channels; no dropout",
        row=25,
    ),
    "bevdepth": Case(BevASPP, ONE, "a copy of row 12", row=30),
}
