# SPDX-License-Identifier: BSD-3-Clause
"""Pyramids as users write them: ways to hold the layers, to pool, to spread, to join."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tests.zoo.case import ONE, Case
from tests.zoo.units import conv_bn, image_pool, unit


class FoundingASPP(nn.Module):
    """The blog's class of 2020: its names, its order, its deprecated upsample."""

    def __init__(self, in_channels=16, out_channels=8, num_classes=5):
        super().__init__()
        self.conv_1x1_1 = nn.Conv2d(in_channels, out_channels, kernel_size=1)
        self.bn_conv_1x1_1 = nn.BatchNorm2d(out_channels)
        for i, rate in enumerate((6, 12, 18), 1):
            conv = nn.Conv2d(in_channels, out_channels, 3, stride=1, padding=rate, dilation=rate)
            setattr(self, f"conv_3x3_{i}", conv)
            setattr(self, f"bn_conv_3x3_{i}", nn.BatchNorm2d(out_channels))
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_1x1_2 = nn.Conv2d(in_channels, out_channels, kernel_size=1)
        self.bn_conv_1x1_2 = nn.BatchNorm2d(out_channels)
        self.conv_1x1_3 = nn.Conv2d(out_channels * 5, out_channels, kernel_size=1)
        self.bn_conv_1x1_3 = nn.BatchNorm2d(out_channels)
        self.conv_1x1_4 = nn.Conv2d(out_channels, num_classes, kernel_size=1)

    def forward(self, feature_map):
        height = feature_map.size()[2]
        width = feature_map.size()[3]
        one = F.relu(self.bn_conv_1x1_1(self.conv_1x1_1(feature_map)))
        two = F.relu(self.bn_conv_3x3_1(self.conv_3x3_1(feature_map)))
        three = F.relu(self.bn_conv_3x3_2(self.conv_3x3_2(feature_map)))
        four = F.relu(self.bn_conv_3x3_3(self.conv_3x3_3(feature_map)))
        img = F.relu(self.bn_conv_1x1_2(self.conv_1x1_2(self.avg_pool(feature_map))))
        img = F.upsample(img, size=(height, width), mode="bilinear")
        out = torch.cat([one, two, three, four, img], 1)
        out = F.relu(self.bn_conv_1x1_3(self.conv_1x1_3(out)))
        return self.conv_1x1_4(out)


class ManyRelus(nn.Module):
    """Each branch has another way to say ReLU."""

    def __init__(self, c=16, w=8):
        super().__init__()
        self.branches = nn.ModuleDict(
            {
                "point": conv_bn(c, w, 1),
                "small": conv_bn(c, w, 3, 2),
                "medium": conv_bn(c, w, 3, 3),
                "large": conv_bn(c, w, 3, 6),
            }
        )
        self.out = nn.Conv2d(4 * w, w, 1)

    def forward(self, x):
        a = self.branches["point"](x).relu()
        b = torch.relu(self.branches["small"](x))
        c = F.relu_(self.branches["medium"](x))
        d = self.branches["large"](x).relu_()
        e = F.relu(self.out(torch.cat([a, b, c, d], dim=1)), inplace=True)
        return e.clamp(min=0)


class ListInForward(nn.Module):
    """The list of branches is built anew each time, in another order than the definition's."""

    def __init__(self, c=16, w=8):
        super().__init__()
        self.near, self.middle, self.far = unit(c, w, 3, 1), unit(c, w, 3, 3), unit(c, w, 3, 6)
        self.point = unit(c, w, 1)
        self.pool = image_pool(c, w)
        self.squash = unit(5 * w, w, 1)

    def forward(self, x):
        stages = [self.far, self.point, self.middle, self.near]
        ys = [stage(x) for stage in stages]
        pooled = F.interpolate(self.pool(x), size=x.shape[2:], mode="nearest")
        ys.insert(2, pooled)
        return self.squash(torch.cat(ys, -3))


class NamedByRate(nn.Module):
    """Names made of rates, a loop with zip, a method for a branch."""

    def __init__(self, c=16, w=8, rates=(1, 2, 4)):
        super().__init__()
        self.rates = rates
        for rate in rates:
            setattr(self, f"conv_d{rate}", nn.Conv2d(c, w, 3, padding=rate, dilation=rate))
            setattr(self, f"norm_d{rate}", nn.BatchNorm2d(w))
        self.widths = [w] * len(rates)
        self.project = nn.Conv2d(sum(self.widths), w, 1, bias=False)

    def branch(self, rate, x):
        return getattr(self, f"norm_d{rate}")(getattr(self, f"conv_d{rate}")(x))

    def forward(self, x):
        outputs = []
        for i, (rate, width) in enumerate(zip(self.rates, self.widths, strict=True)):
            y = F.relu(self.branch(rate, x))
            assert y.shape[1] == width, i
            outputs.append(y)
        return self.project(torch.concat(outputs, dim=1))


class ChildrenLoop(nn.Sequential):
    """A Sequential that isn't sequential: everything that it holds reads x."""

    def __init__(self, c=16, w=8, rates=(1, 3, 5)):
        super().__init__(*[unit(c, w, 1 if r == 1 else 3, r) for r in rates])

    def forward(self, x):
        return torch.cat([child(x) for child in self.children()], dim=1)


class PooledBesideProjection(nn.Module):
    """The pooled vector is added behind the projection; + spreads it."""

    def __init__(self, c=16, w=8, rates=(2, 4, 6)):
        super().__init__()
        self.atrous = nn.ModuleList([unit(c, w, 3, r) for r in rates])
        self.context = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, w, 1), nn.ReLU())
        self.project = conv_bn(w * len(rates), w, 1)

    def forward(self, x):
        y = self.project(torch.cat([m(x) for m in self.atrous], 1))
        return F.relu(y + self.context(x))


class WindowOfMapSize(nn.Module):
    """F.avg_pool2d with the whole map as its window."""

    def __init__(self, c=16, w=8):
        super().__init__()
        self.a, self.b, self.c = unit(c, w, 1), unit(c, w, 3, 2), unit(c, w, 3, 5)
        self.img = unit(c, w, 1)

    def forward(self, x):
        g = self.img(F.avg_pool2d(x, x.shape[2:]))
        g = F.interpolate(g, x.shape[-2:], mode="bilinear", align_corners=True)
        return torch.cat([self.a(x), self.b(x), self.c(x), g], 1)


class Spread(nn.Module):
    """One class for the ways to spread the pooled map."""

    def __init__(self, how, c=16, w=8, rates=(2, 3, 6)):
        super().__init__()
        self.how = how
        self.point = unit(c, w, 1)
        self.stages = nn.ModuleList(unit(c, w, 3, r) for r in rates)
        self.pool = image_pool(c, w)
        self.fuse = unit((len(rates) + 2) * w, w, 1)

    def spread(self, g, y):
        n, _, h, w = y.shape
        if self.how == "expand":
            return g.expand(n, -1, h, w)
        if self.how == "expand_as":
            return g.expand_as(y)
        if self.how == "repeat":
            return g.repeat(1, 1, h, w)
        if self.how == "upsample":
            return nn.Upsample(size=(h, w), mode="bilinear", align_corners=True)(g)
        if self.how == "zeros":
            return torch.zeros_like(y) + g
        if self.how == "ones":
            return g * torch.ones(1, 1, h, w, device=g.device, dtype=g.dtype)
        return F.interpolate(g, size=(h, w), mode=self.how)

    def forward(self, x):
        ys = [self.point(x)] + [stage(x) for stage in self.stages]
        return self.fuse(torch.cat([*ys, self.spread(self.pool(x), ys[0])], dim=1))


class SumProjected(nn.Module):
    """The sum is as wide as one branch."""

    def __init__(self, c=16, w=8, rates=(2, 3, 6)):
        super().__init__()
        self.convs = nn.ModuleList(conv_bn(c, w, 3, r) for r in rates)
        self.mix = unit(w, w, 1)
        self.last = nn.Conv2d(w, 5, 3, padding=1)

    def forward(self, x):
        return self.last(self.mix(sum(conv(x) for conv in self.convs)))


class ActAgain(nn.Module):
    """No norms; what each branch gives is rectified, and what they are together."""

    def __init__(self, c=16, w=8, rates=(2, 3, 6)):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, w, 3, padding=r, dilation=r) for r in rates)

    def forward(self, x):
        return F.relu(torch.cat([F.relu(conv(x)) for conv in self.convs], 1))


class SumOf(nn.Module):
    """One class for the ways to add branches up."""

    def __init__(self, how, c=16, w=8, rates=(2, 3, 6)):
        super().__init__()
        self.how = how
        self.convs = nn.ModuleList(conv_bn(c, w, 3, r) for r in rates)

    def forward(self, x):
        ys = [conv(x) for conv in self.convs]
        if self.how == "sum":
            y = sum(ys)
        elif self.how == "in place":
            y = ys[0]
            for other in ys[1:]:
                y += other
        elif self.how == "stack":
            y = torch.stack(ys).sum(0)
        elif self.how == "mean":
            y = torch.stack(ys, dim=1).mean(dim=1)
        else:
            y = functools.reduce(torch.add, ys)
        return F.relu(y)


class WeightedSum(nn.Module):
    """Learned shares of the branches."""

    def __init__(self, c=16, w=8, rates=(1, 2, 4)):
        super().__init__()
        self.convs = nn.ModuleList(unit(c, w, 3, r) for r in rates)
        self.alpha = nn.Parameter(torch.zeros(len(rates)))

    def forward(self, x):
        shares = torch.softmax(self.alpha, dim=0)
        return sum(share * conv(x) for share, conv in zip(shares, self.convs, strict=True))


class DeepLabV2(nn.Module):
    """Four biased convolutions to the classes, added in place."""

    def __init__(self, c=16, classes=5):
        super().__init__()
        for i, rate in enumerate((6, 12, 18, 24), 1):
            setattr(self, f"fc8_{i}", nn.Conv2d(c, classes, 3, 1, rate, rate))

    def forward(self, x):
        out = self.fc8_1(x)
        out += self.fc8_2(x)
        out += self.fc8_3(x)
        out += self.fc8_4(x)
        return out


class HorizontalStack(nn.Module):
    """torch.hstack joins along the second dimension, which is the channels'."""

    def __init__(self, c=16, w=8):
        super().__init__()
        self.a, self.b = unit(c, w, 1), unit(c, w, 3, 4)

    def forward(self, x):
        return torch.hstack([self.a(x), self.b(x)])


class Preallocated(nn.Module):
    """Branches are written into slices of a buffer."""

    def __init__(self, c=16, w=8, rates=(1, 2, 4)):
        super().__init__()
        self.convs, self.w = nn.ModuleList(unit(c, w, 3, r) for r in rates), w

    def forward(self, x):
        n, _, h, w = x.shape
        out = x.new_empty(n, self.w * len(self.convs), h, w)
        for i, conv in enumerate(self.convs):
            out[:, i * self.w : (i + 1) * self.w] = conv(x)
        return out


class Inherited(Spread):
    """A subclass with settings of its own; forward is its parent's."""

    def __init__(self):
        super().__init__("expand", rates=(3, 6, 9, 12))


@dataclass
class HeadConfig:
    channels: int = 16
    width: int = 8
    rates: list[int] = field(default_factory=lambda: [2, 4, 6])
    use_pool: bool = True
    dropout: float = 0.1


class Configured(nn.Module):
    """forward reads a dataclass."""

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.config = config
        c, w = config.channels, config.width
        self.atrous = nn.ModuleList([unit(c, w, 3, r) for r in config.rates])
        self.pool = image_pool(c, w) if config.use_pool else None
        self.project = unit(w * (len(config.rates) + config.use_pool), w, 1)

    def forward(self, x):
        ys = [m(x) for m in self.atrous]
        if self.config.use_pool and self.pool is not None:
            ys.append(F.interpolate(self.pool(x), x.shape[-2:], mode="bilinear"))
        y = self.project(torch.cat(ys, dim=1))
        return F.dropout(y, self.config.dropout, training=self.training)


class Annotated(nn.Module):
    """Written for TorchScript: typed lists, annotations, a method left out of it."""

    rates: list[int]

    def __init__(self, c: int = 16, w: int = 8):
        super().__init__()
        self.rates = [2, 4]
        self.convs = nn.ModuleList([unit(c, w, 3, r) for r in self.rates])
        self.project = unit(len(self.rates) * w, w, 1)

    @torch.jit.unused
    def describe(self) -> str:
        return f"rates {self.rates}"

    def forward(self, x: Tensor) -> Tensor:
        res = torch.jit.annotate(list[Tensor], [])
        for conv in self.convs:
            res.append(conv(x))
        if not torch.jit.is_scripting():
            assert len(res) == len(self.rates), self.describe()
        return self.project(torch.cat(res, dim=1))


class BareParameters(nn.Module):
    """No layers: parameters and functions."""

    def __init__(self, c=16, w=8, rates=(1, 2, 5)):
        super().__init__()
        self.rates = rates
        shapes = [(w, c, 3, 3)] * len(rates)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(s) * 0.1) for s in shapes)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(w)) for _ in rates)

    def forward(self, x):
        ys = []
        for weight, bias, r in zip(self.weights, self.biases, self.rates, strict=True):
            ys.append(F.relu(F.conv2d(x, weight, bias, padding=r, dilation=r)))
        return torch.cat(ys, 1)


def spread(how: str, remark: str) -> Case:
    return Case(lambda: Spread(how), ONE, remark)


def summed(how: str, remark: str) -> Case:
    return Case(lambda: SumOf(how), ONE, remark)


FORMS = {
    "founding": Case(FoundingASPP, ONE, "biases before norms; F.upsample; classifier"),
    "founding_full": Case(
        lambda: FoundingASPP(512, 256, 19), ((2, 512, 7, 8),), "4,138,259 parameters"
    ),
    "many_relus": Case(ManyRelus, ONE, "each branch has another ReLU, two of them in place"),
    "list_in_forward": Case(
        ListInForward, ONE, "order of use; pooled third, by nearest; cat at -3"
    ),
    "named_by_rate": Case(NamedByRate, ONE, "getattr by rate, zip, assert, torch.concat"),
    "children_loop": Case(ChildrenLoop, ONE, "a Sequential with its own forward"),
    "pooled_beside_projection": Case(
        PooledBesideProjection, ONE, "the pooled vector is added behind the projection"
    ),
    "window_of_map_size": Case(WindowOfMapSize, ONE, "F.avg_pool2d with the map as its window"),
    "spread_expand": spread("expand", "pooled map by expand"),
    "spread_expand_as": spread("expand_as", "pooled map by expand_as"),
    "spread_repeat": spread("repeat", "pooled map by repeat"),
    "spread_upsample": spread("upsample", "nn.Upsample made in forward"),
    "spread_zeros": spread("zeros", "pooled map added to zeros"),
    "spread_ones": spread("ones", "pooled map times ones"),
    "spread_bilinear": spread("bilinear", "align_corners not said"),
    "spread_bicubic": spread("bicubic", "pooled map by bicubic interpolation"),
    "sum_builtin": summed("sum", "sum(), which begins with 0"),
    "sum_in_place": summed("in place", "+="),
    "sum_stack": summed("stack", "torch.stack and sum"),
    "sum_mean": summed("mean", "torch.stack and mean"),
    "sum_reduce": summed("reduce", "functools.reduce with torch.add"),
    "sum_projected": Case(SumProjected, ONE, "a sum that a 1x1 unit reads, and a 3x3"),
    "act_again": Case(ActAgain, ONE, "a ReLU behind the concatenation of ReLUs"),
    "weighted_sum": Case(WeightedSum, ONE, "learned shares, softmax of a parameter"),
    "deeplab_v2": Case(DeepLabV2, ONE, "biased convolutions to the classes, +="),
    "horizontal_stack": Case(HorizontalStack, ONE, "torch.hstack; two branches"),
    "preallocated": Case(Preallocated, ONE, "branches written into slices of an empty tensor"),
    "inherited": Case(Inherited, ONE, "forward is the parent's; four rates"),
    "configured": Case(lambda: Configured(HeadConfig()), ONE, "forward reads a dataclass"),
    "configured_no_pool": Case(
        lambda: Configured(HeadConfig(use_pool=False, dropout=0.0)), ONE, "pool is None"
    ),
    "annotated": Case(Annotated, ONE, "torch.jit.annotate and friends"),
    "bare_parameters": Case(BareParameters, ONE, "ParameterLists and F.conv2d, no layers"),
}
