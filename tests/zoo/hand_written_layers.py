# SPDX-License-Identifier: BSD-3-Clause
"""Pyramids as users write them: norms, activations, dropout and convolutions of all kinds."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.zoo.case import ONE, Case
from tests.zoo.units import conv_bn, image_pool, unit


class AnyLayers(nn.Module):
    """A pyramid whose norm and activation are arguments, as a config would choose them."""

    def __init__(self, norm=nn.BatchNorm2d, act=nn.ReLU, c=16, w=8, rates=(1, 2, 3, 6), bias=False):
        super().__init__()

        def layer(cin, k, r):
            conv = nn.Conv2d(cin, w, k, padding=(k // 2) * r, dilation=r, bias=bias)
            return nn.Sequential(conv, norm(w), act())

        self.blocks = nn.ModuleList([layer(c, 1 if r == 1 else 3, r) for r in rates])
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.gap_conv = nn.Sequential(nn.Conv2d(c, w, 1), act())
        self.project = layer(w * (len(rates) + 1), 1, 1)

    def forward(self, x):
        ys = [block(x) for block in self.blocks]
        g = self.gap_conv(self.gap(x))
        ys.append(F.interpolate(g, size=x.shape[2:], mode="bilinear", align_corners=False))
        return self.project(torch.cat(ys, dim=1))


class FrozenNorm(nn.Module):
    """Statistics and affine values as buffers: x * scale + shift."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.linspace(0.5, 1.5, channels))
        self.register_buffer("bias", torch.linspace(-0.2, 0.2, channels))
        self.register_buffer("running_mean", torch.linspace(-0.1, 0.3, channels))
        self.register_buffer("running_var", torch.linspace(0.8, 1.2, channels))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class ChannelsLastNorm(nn.Module):
    """LayerNorm over the channels, as ConvNeXt has it."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Affine(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x):
        return torch.addcmul(self.shift, x, self.scale)


class NormOverAll(nn.Module):
    """Bare convolutions; a norm and an activation over the concatenation."""

    def __init__(self, c=16, w=6, rates=(1, 2, 4), act=nn.PReLU):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(c, w, 3, padding=r, dilation=r, bias=False) for r in rates
        )
        self.bn = nn.BatchNorm2d(w * len(rates), eps=1e-3)
        self.act = act()

    def forward(self, x):
        return self.act(self.bn(torch.cat([conv(x) for conv in self.convs], 1)))


class ActAfterCat(nn.Module):
    """Norms in the branches, one activation after the concatenation."""

    def __init__(self, c=16, w=8):
        super().__init__()
        self.branches = nn.ModuleList([conv_bn(c, w, 1), conv_bn(c, w, 3, 3), conv_bn(c, w, 3, 6)])
        self.project = nn.Conv2d(3 * w, w, 1)

    def forward(self, x):
        y = torch.cat([b(x) for b in self.branches], dim=1)
        y = F.relu(y, inplace=True)
        return self.project(y)


class SharedPReLU(nn.Module):
    """One PReLU, with a slope for each channel, for all branches."""

    def __init__(self, c=16, w=8, rates=(2, 4)):
        super().__init__()
        self.convs = nn.ModuleList(conv_bn(c, w, 3, r) for r in rates)
        self.act = nn.PReLU(w)

    def forward(self, x):
        return torch.cat([self.act(conv(x)) for conv in self.convs], dim=1)


class DropoutInside(nn.Module):
    """Three kinds of dropout: in branches, after the concatenation, at the end."""

    def __init__(self, c=16, w=8, rates=(2, 3, 6), p=0.2):
        super().__init__()
        self.p = p
        self.branches = nn.ModuleList(
            nn.Sequential(*unit(c, w, 3, r), nn.Dropout2d(p)) for r in rates
        )
        self.drop = nn.Dropout(p)
        self.project = unit(len(rates) * w, w, 1)

    def forward(self, x):
        y = self.drop(torch.cat([b(x) for b in self.branches], dim=1))
        return F.dropout(self.project(y), p=self.p, training=self.training)


class UnequalWidths(nn.Module):
    """The wider the rate the fewer the channels; both axes have rates of their own."""

    def __init__(self, c=16):
        super().__init__()
        self.a = nn.Conv2d(c, 12, 1)
        self.b = nn.Conv2d(c, 8, 3, padding=(2, 3), dilation=(2, 3))
        self.c = nn.Conv2d(c, 5, 3, padding=(4, 1), dilation=(4, 1))
        self.d = nn.Conv2d(c, 3, 3, padding=(6, 9), dilation=(6, 9))
        self.mix = unit(28, 8, 1)

    def forward(self, x):
        return self.mix(F.relu(torch.cat([self.a(x), self.b(x), self.c(x), self.d(x)], 1)))


class MixedKernels(nn.Module):
    """5x5, 7x7, 1x3 and 3x1 beside 3x3."""

    def __init__(self, c=16, w=4):
        super().__init__()
        self.k3 = nn.Conv2d(c, w, 3, padding=4, dilation=4)
        self.k5 = nn.Conv2d(c, w, 5, padding=4, dilation=2)
        self.k7 = nn.Conv2d(c, w, 7, padding=3)
        self.row = nn.Conv2d(c, w, (1, 3), padding=(0, 2), dilation=(1, 2))
        self.column = nn.Conv2d(c, w, (3, 1), padding=(2, 0), dilation=(2, 1))
        self.norm = nn.BatchNorm2d(5 * w)

    def forward(self, x):
        ys = [self.k3(x), self.k5(x), self.k7(x), self.row(x), self.column(x)]
        return F.relu(self.norm(torch.cat(ys, dim=1)))


class PaddingSame(nn.Module):
    def __init__(self, c=16, w=8, rates=(1, 2, 3, 6)):
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Conv2d(c, w, 3, padding="same", dilation=r, bias=False) for r in rates]
        )
        self.bns = nn.ModuleList([nn.BatchNorm2d(w) for _ in rates])

    def forward(self, x):
        pairs = zip(self.layers, self.bns, strict=True)
        return torch.cat([torch.relu(bn(layer(x))) for layer, bn in pairs], dim=1)


class PaddedBefore(nn.Module):
    """Zeros are put around by a layer of their own; the convolutions have none."""

    def __init__(self, c=16, w=8, rates=(2, 4)):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.ZeroPad2d(r), nn.Conv2d(c, w, 3, dilation=r), nn.ReLU()) for r in rates
        )

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


class Separable(nn.Module):
    """Depthwise and pointwise: nothing, a norm, or norm and ReLU between; biases or none."""

    def __init__(self, between="nothing", bias=False, c=16, w=8, rates=(2, 3, 6), multiplier=1):
        super().__init__()
        mid = c * multiplier

        def branch(r):
            layers = [nn.Conv2d(c, mid, 3, padding=r, dilation=r, groups=c, bias=bias)]
            if between != "nothing":
                layers.append(nn.BatchNorm2d(mid))
            if between == "norm and relu":
                layers.append(nn.ReLU(inplace=True))
            layers += [nn.Conv2d(mid, w, 1, bias=bias), nn.BatchNorm2d(w), nn.ReLU(inplace=True)]
            return nn.Sequential(*layers)

        self.point = unit(c, w, 1)
        self.branches = nn.ModuleList(branch(r) for r in rates)
        self.pool = image_pool(c, w)
        self.project = unit((len(rates) + 2) * w, w, 1)

    def forward(self, x):
        y = [self.point(x), *(b(x) for b in self.branches)]
        y.append(self.pool(x).expand(-1, -1, x.size(2), x.size(3)))
        return self.project(torch.cat(y, 1))


class DepthwiseOnly(nn.Module):
    """Depthwise branches, concatenated; one pointwise convolution for all."""

    def __init__(self, c=16, w=8, rates=(1, 2, 4)):
        super().__init__()
        self.dw = nn.ModuleList(
            nn.Conv2d(c, c, 3, padding=r, dilation=r, groups=c, bias=False) for r in rates
        )
        self.pw = unit(c * len(rates), w, 1)

    def forward(self, x):
        return self.pw(torch.cat([conv(x) for conv in self.dw], dim=1))


class Grouped(nn.Module):
    """Convolutions of two and of four groups beside a dense one."""

    def __init__(self, c=16, w=8):
        super().__init__()
        self.dense = unit(c, w, 3, 2)
        self.two = nn.Conv2d(c, w, 3, padding=3, dilation=3, groups=2)
        self.four = nn.Conv2d(c, w, 3, padding=6, dilation=6, groups=4)

    def forward(self, x):
        return torch.cat([self.dense(x), F.relu(self.two(x)), F.relu(self.four(x))], dim=1)


class OneNormForAll(nn.Module):
    """A norm that each branch uses in turn, and the pooled one as well."""

    def __init__(self, c=16, w=8, rates=(2, 4, 6)):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, w, 3, padding=r, dilation=r) for r in rates)
        self.pool_conv = nn.Conv2d(c, w, 1)
        self.norm = nn.BatchNorm2d(w)

    def forward(self, x):
        ys = [F.relu(self.norm(conv(x))) for conv in self.convs]
        g = F.relu(self.norm(self.pool_conv(x.mean((2, 3), keepdim=True))))
        return torch.cat([*ys, g.expand_as(ys[0])], 1)


class SharedPointwise(nn.Module):
    """The same 1x1 convolution reads x and the pooled map."""

    def __init__(self, c=16, w=8):
        super().__init__()
        self.one = unit(c, w, 1)
        self.three, self.six = unit(c, w, 3, 3), unit(c, w, 3, 6)
        self.project = unit(4 * w, w, 1)

    def forward(self, x):
        g = self.one(F.adaptive_avg_pool2d(x, 1))
        g = F.interpolate(g, size=x.shape[2:], mode="bilinear", align_corners=True)
        return self.project(torch.cat([self.one(x), self.three(x), self.six(x), g], 1))


class Bottlenecked(nn.Module):
    """Each branch narrows by a 1x1 before its atrous convolution."""

    def __init__(self, c=16, mid=4, w=8, rates=(2, 4, 6)):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*unit(c, mid, 1), *unit(mid, w, 3, r)) for r in rates
        )
        self.project = unit(len(rates) * w, w, 1)

    def forward(self, x):
        return self.project(torch.cat([b(x) for b in self.branches], dim=1))


class ReceptiveFieldBlock(nn.Module):
    """RFB: 1x1, a plain kernel, an atrous one; scaled and added to a shortcut."""

    def __init__(self, c=16, w=8, scale=0.1):
        super().__init__()
        self.scale = scale
        self.branch0 = nn.Sequential(*unit(c, 4, 1), *conv_bn(4, w, 3, 1))
        self.branch1 = nn.Sequential(*unit(c, 4, 1), *unit(4, w, 3), *conv_bn(w, w, 3, 3))
        self.branch2 = nn.Sequential(*unit(c, 4, 1), *unit(4, w, 5), *conv_bn(w, w, 3, 5))
        self.linear, self.shortcut = conv_bn(3 * w, w, 1), conv_bn(c, w, 1)

    def forward(self, x):
        y = torch.cat((self.branch0(x), self.branch1(x), self.branch2(x)), 1)
        return F.relu(self.linear(y) * self.scale + self.shortcut(x))


def group_norm(channels):
    return nn.GroupNorm(4, channels)


def no_affine(channels):
    return nn.BatchNorm2d(channels, affine=False)


def batch_statistics(channels):
    return nn.BatchNorm2d(channels, track_running_stats=False)


def cumulative(channels):
    return nn.BatchNorm2d(channels, momentum=None)


def with_norm(norm, remark: str) -> Case:
    return Case(lambda: AnyLayers(norm=norm), ONE, remark)


def with_act(act, remark: str) -> Case:
    return Case(lambda: AnyLayers(act=act), ONE, remark)


BOTTLENECKS = "branches of 1x1 and 3x3: only the 1x1s are siblings that read one input"

LAYERS = {
    "norm_group": with_norm(group_norm, "GroupNorm"),
    "norm_instance": with_norm(lambda w: nn.InstanceNorm2d(w, affine=True), "InstanceNorm"),
    "norm_sync": with_norm(nn.SyncBatchNorm, "SyncBatchNorm without a process group"),
    "norm_frozen": with_norm(FrozenNorm, "a hand-written frozen norm: x * scale + shift"),
    "norm_no_affine": with_norm(no_affine, "BatchNorm without weight and bias"),
    "norm_no_statistics": with_norm(batch_statistics, "BatchNorm without running statistics"),
    "norm_cumulative": with_norm(cumulative, "BatchNorm with momentum=None"),
    "norm_layer": with_norm(ChannelsLastNorm, "LayerNorm between two permutes"),
    "norm_affine": with_norm(Affine, "scale and shift parameters by addcmul"),
    "norm_identity": with_norm(lambda w: nn.Identity(), "Identity for a norm, no bias"),
    "act_elu": with_act(nn.ELU, "ELU"),
    "act_gelu": with_act(nn.GELU, "GELU"),
    "act_silu": with_act(lambda: nn.SiLU(inplace=True), "SiLU in place"),
    "act_hardswish": with_act(nn.Hardswish, "Hardswish"),
    "act_mish": with_act(nn.Mish, "Mish"),
    "act_prelu": with_act(nn.PReLU, "a PReLU of each layer"),
    "act_leaky": with_act(lambda: nn.LeakyReLU(0.1, inplace=True), "LeakyReLU in place"),
    "act_tanh": with_act(nn.Tanh, "tanh"),
    "norm_over_all": Case(NormOverAll, ONE, "one norm and PReLU over the concatenation"),
    "act_after_cat": Case(ActAfterCat, ONE, "one ReLU, in place, after the concatenation"),
    "shared_prelu": Case(SharedPReLU, ONE, "one PReLU with channel slopes for all branches"),
    "dropout_inside": Case(DropoutInside, ONE, "dropouts in branches, after cat, at the end"),
    "unequal_widths": Case(UnequalWidths, ONE, "unequal widths, rates per axis"),
    "mixed_kernels": Case(MixedKernels, ONE, "5x5, 7x7, 1x3, 3x1 beside 3x3"),
    "padding_same": Case(PaddingSame, ONE, 'padding="same"'),
    "padded_before": Case(PaddedBefore, ONE, "ZeroPad2d, then a convolution without padding"),
    "separable": Case(Separable, ONE, "nothing between"),
    "separable_norm": Case(lambda: Separable("norm"), ONE, "a norm between"),
    "separable_norm_relu": Case(lambda: Separable("norm and relu"), ONE, "norm and ReLU between"),
    "separable_bias": Case(lambda: Separable(bias=True), ONE, "biases of both, nothing between"),
    "separable_multiplier": Case(
        lambda: Separable("norm", multiplier=2), ONE, "two depthwise results a channel"
    ),
    "depthwise_only": Case(DepthwiseOnly, ONE, "depthwise branches, one pointwise after the cat"),
    "grouped": Case(Grouped, ONE, "groups of 1, 2 and 4"),
    "one_norm_for_all": Case(OneNormForAll, ONE, "a norm used four times, once on the pooled map"),
    "shared_pointwise": Case(SharedPointwise, ONE, "a 1x1 unit used on x and on the pooled map"),
    "bottlenecked": Case(Bottlenecked, ONE, BOTTLENECKS),
    "receptive_field_block": Case(ReceptiveFieldBlock, ONE, f"RFB; {BOTTLENECKS}"),
}
