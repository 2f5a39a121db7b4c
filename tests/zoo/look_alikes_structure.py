# SPDX-License-Identifier: BSD-3-Clause
"""What only looks like a pyramid: chains, branches of other inputs, siblings without dilation."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.zoo.case import MAP, ONE, Case
from tests.zoo.units import conv_bn, image_pool, unit


class Waterfall(nn.Module):
    """WASP of UniPose: atrous convolutions in a row, a 1x1 for all of them, twice."""

    def __init__(self, c=16, w=8, rates=(24, 18, 12, 6)):
        super().__init__()
        widths = [c, w, w, w]
        self.stages = nn.ModuleList(
            unit(cin, w, 3, r) for cin, r in zip(widths, rates, strict=True)
        )
        self.shared = nn.Conv2d(w, w, 1, bias=False)
        self.pool = image_pool(c, w)
        self.project = unit(5 * w, w, 1)

    def forward(self, x):
        ys, y = [], x
        for stage in self.stages:
            y = stage(y)
            ys.append(self.shared(self.shared(y)))
        pooled = F.interpolate(self.pool(x), size=y.shape[2:], mode="bilinear", align_corners=True)
        return self.project(torch.cat([*ys, pooled], dim=1))


class DenseChain(nn.Module):
    def __init__(self, c=16, w=4, rates=(3, 6, 12)):
        super().__init__()
        self.blocks = nn.ModuleList(unit(c + i * w, w, 3, r) for i, r in enumerate(rates))

    def forward(self, x):
        for block in self.blocks:
            x = torch.cat([x, block(x)], dim=1)
        return x


class Cascade(nn.Module):
    """D-LinkNet's centre: a chain whose links are added up."""

    def __init__(self, c=16, rates=(1, 2, 4, 8)):
        super().__init__()
        self.dilates = nn.ModuleList(nn.Conv2d(c, c, 3, padding=r, dilation=r) for r in rates)

    def forward(self, x):
        out, y = x, x
        for dilate in self.dilates:
            y = F.relu(dilate(y))
            out = out + y
        return out


class DilatedBottleneck(nn.Module):
    def __init__(self, cin, width, rate):
        super().__init__()
        cout = 2 * width
        self.conv1, self.conv2 = unit(cin, width, 1), unit(width, width, 3, rate)
        self.conv3 = conv_bn(width, cout, 1)
        self.downsample = conv_bn(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        return F.relu(self.conv3(self.conv2(self.conv1(x))) + self.downsample(x))


class Inception(nn.Module):
    """1x1, 3x3, 5x5 and a max pool, no dilation; narrowed before the wide kernels."""

    def __init__(self, c=16, w=4):
        super().__init__()
        self.b1 = unit(c, w, 1)
        self.b3 = nn.Sequential(unit(c, w, 1), unit(w, w, 3))
        self.b5 = nn.Sequential(unit(c, w, 1), unit(w, w, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), unit(c, w, 1))

    def forward(self, x):
        return torch.cat([self.b1(x), self.b3(x), self.b5(x), self.pool(x)], 1)


class HighResolution(nn.Module):
    """HRNet: parallel branches, each with a map of its own."""

    def __init__(self, c=16, low=8, w=8):
        super().__init__()
        self.high, self.low = unit(c, w, 3, 2), unit(low, w, 3, 4)

    def forward(self, maps):
        y, z = self.high(maps[0]), self.low(maps[1])
        z = F.interpolate(z, size=y.shape[2:], mode="bilinear", align_corners=False)
        return torch.cat([y, z], dim=1)


class VortexPooling(nn.Module):
    """Each atrous convolution reads the input averaged over another window."""

    def __init__(self, c=16, w=8, rates=(3, 5, 7)):
        super().__init__()
        self.pools = nn.ModuleList(nn.AvgPool2d(k, stride=1, padding=k // 2) for k in rates)
        self.convs = nn.ModuleList(unit(c, w, 3, r) for r in rates)

    def forward(self, x):
        pairs = zip(self.pools, self.convs, strict=True)
        return torch.cat([conv(pool(x)) for pool, conv in pairs], dim=1)


class SplitChannels(nn.Module):
    """Each branch reads channels of its own."""

    def __init__(self, c=24, w=8, rates=(1, 3, 6)):
        super().__init__()
        self.convs = nn.ModuleList(unit(c // len(rates), w, 3, r) for r in rates)

    def forward(self, x):
        parts = x.chunk(len(self.convs), dim=1)
        return torch.cat([conv(p) for conv, p in zip(self.convs, parts, strict=True)], dim=1)


class ScaleSpace(nn.Module):
    """One convolution reads the input at three sizes."""

    def __init__(self, c=16, w=8):
        super().__init__()
        self.conv = unit(c, w, 3, 2)

    def forward(self, x):
        ys = []
        for factor in (1.0, 0.75, 0.5):
            size = [max(2, int(s * factor)) for s in x.shape[2:]]
            y = self.conv(F.interpolate(x, size=size, mode="bilinear", align_corners=False))
            ys.append(F.interpolate(y, size=x.shape[2:], mode="nearest"))
        return torch.stack(ys).max(dim=0).values


class LiteReduced(nn.Module):
    """LR-ASPP: a 1x1 times a sigmoid of the pooled map; no atrous convolution."""

    def __init__(self, c=16, w=8):
        super().__init__()
        self.cbr = unit(c, w, 1)
        self.scale = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, w, 1, bias=False), nn.Sigmoid()
        )

    def forward(self, x):
        return self.cbr(x) * self.scale(x)


class PyramidPooling(nn.Module):
    """PSPNet: pooled maps of several sizes, joined to the input."""

    def __init__(self, c=16, w=4, bins=(1, 2, 3, 6)):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(b), nn.Conv2d(c, w, 1), nn.ReLU()) for b in bins
        )

    def forward(self, x):
        size = x.shape[2:]
        ups = [F.interpolate(s(x), size, mode="bilinear", align_corners=True) for s in self.stages]
        return torch.cat([x, *ups], 1)


class MaxPools(nn.Module):
    """YOLO's SPP: max pools of several windows, one of them dilated."""

    def __init__(self, c=16, w=8):
        super().__init__()
        self.reduce = unit(c, w, 1)
        self.pools = nn.ModuleList(
            [
                nn.MaxPool2d(5, 1, padding=2),
                nn.MaxPool2d(9, 1, padding=4),
                nn.MaxPool2d(3, 1, padding=1),
            ]
        )
        self.out = unit(4 * w, w, 1)

    def forward(self, x):
        x = self.reduce(x)
        return self.out(torch.cat([x, *(pool(x) for pool in self.pools)], 1))


class TwoHeads(nn.Module):
    """A detector's: two plain 3x3 and two 1x1 convolutions over one map, no dilation."""

    def __init__(self, c=16):
        super().__init__()
        self.tower_a, self.tower_b = unit(c, 8), unit(c, 8)
        self.objectness, self.centre = nn.Conv2d(c, 1, 1), nn.Conv2d(c, 2, 1)

    def forward(self, x):
        return self.tower_a(x), self.tower_b(x), self.objectness(x), self.centre(x)


class NonLocal(nn.Module):
    """Attention: three 1x1 convolutions over one map."""

    def __init__(self, c=16, w=4):
        super().__init__()
        self.q, self.k, self.v = nn.Conv2d(c, w, 1), nn.Conv2d(c, w, 1), nn.Conv2d(c, c, 1)

    def forward(self, x):
        q, k, v = self.q(x).flatten(2), self.k(x).flatten(2), self.v(x).flatten(2)
        attention = torch.softmax(q.transpose(1, 2) @ k, dim=-1)
        return x + (v @ attention.transpose(1, 2)).view_as(x)


class SingleAtrous(nn.Module):
    """One atrous convolution, the input beside it."""

    def __init__(self, c=16, w=8):
        super().__init__()
        self.conv = unit(c, w, 3, 4)

    def forward(self, x):
        return torch.cat([x, self.conv(x)], dim=1)


class Deformed(nn.Module):
    """Each branch samples where an offset says, then a 1x1."""

    def __init__(self, c=16, w=8, branches=3):
        super().__init__()
        self.offsets = nn.ModuleList(nn.Conv2d(c, 2, 3, padding=1) for _ in range(branches))
        self.convs = nn.ModuleList(unit(c, w, 1) for _ in range(branches))

    def forward(self, x):
        eye = torch.eye(2, 3, device=x.device, dtype=x.dtype).repeat(x.shape[0], 1, 1)
        base = F.affine_grid(eye, list(x.shape), align_corners=False)
        ys = []
        for offset, conv in zip(self.offsets, self.convs, strict=True):
            grid = base + 0.1 * torch.tanh(offset(x)).permute(0, 2, 3, 1)
            ys.append(conv(F.grid_sample(x, grid, align_corners=False)))
        return torch.cat(ys, 1)


def bottlenecks():
    return nn.Sequential(
        DilatedBottleneck(16, 8, 1), DilatedBottleneck(16, 16, 2), DilatedBottleneck(32, 16, 4)
    )


def context_network():
    return nn.Sequential(*[unit(16, 16, 3, r) for r in (1, 1, 2, 4, 8, 1)])


def other(make, remark: str, shapes=ONE, list_input=False) -> Case:
    return Case(make, shapes, remark, pyramid=False, list_input=list_input)


STRUCTURE = {
    "waterfall": other(Waterfall, "each atrous layer reads the one before it"),
    "dense_chain": other(DenseChain, "each block reads all before it"),
    "cascade": other(Cascade, "a chain whose links are added up"),
    "bottlenecks": other(bottlenecks, "a dilated ResNet's last stage: one after another"),
    "context_network": other(context_network, "a Sequential of atrous convolutions"),
    "inception": other(Inception, "no dilation; narrowed branches, a max pool"),
    "high_resolution": other(
        HighResolution, "each branch reads its own map", (MAP, (2, 8, 7, 8)), list_input=True
    ),
    "vortex_pooling": other(VortexPooling, "each branch reads another average of the input"),
    "split_channels": other(
        SplitChannels, "each branch reads channels of its own", ((2, 24, 13, 15),)
    ),
    "scale_space": other(ScaleSpace, "one convolution reads the input at three sizes"),
    "lite_reduced": other(LiteReduced, "LR-ASPP: no atrous convolution"),
    "pyramid_pooling": other(PyramidPooling, "PSPNet: pooled maps, no atrous convolution"),
    "max_pools": other(MaxPools, "SPP: max pools, no atrous convolution"),
    "two_heads": other(TwoHeads, "siblings without dilation, nothing joins them"),
    "non_local": other(NonLocal, "siblings of 1x1, for attention"),
    "single_atrous": other(SingleAtrous, "one branch is no pyramid"),
    "deformed": other(Deformed, "samples at learned offsets"),
}
