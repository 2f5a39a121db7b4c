# SPDX-License-Identifier: BSD-3-Clause
"""Pyramids as users write them: what is around, from a residual to a whole network."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.zoo.case import MAP, ONE, Case
from tests.zoo.units import conv_bn, image_pool, unit


class Pyramid(nn.Module):
    """An ordinary one, for the others."""

    def __init__(self, c=16, w=8, rates=(2, 3, 6)):
        super().__init__()
        self.point = unit(c, w, 1)
        self.atrous = nn.ModuleList(unit(c, w, 3, r) for r in rates)
        self.pool = image_pool(c, w)
        self.project = unit((len(rates) + 2) * w, w, 1)

    def forward(self, x):
        ys = [self.point(x), *(m(x) for m in self.atrous)]
        ys.append(F.interpolate(self.pool(x), x.shape[-2:], mode="bilinear", align_corners=False))
        return self.project(torch.cat(ys, dim=1))


class Residual(nn.Module):
    """x + aspp(x), in one module."""

    def __init__(self, c=16, rates=(1, 2, 4)):
        super().__init__()
        self.convs = nn.ModuleList(unit(c, c // 2, 3, r) for r in rates)
        self.back = conv_bn(c // 2 * len(rates), c, 1)

    def forward(self, x):
        return F.relu(x + self.back(torch.cat([conv(x) for conv in self.convs], 1)))


class ReducedFirst(nn.Module):
    """A 1x1 makes the input narrow; its result is what the branches read, and is joined, too."""

    def __init__(self, c=32, mid=8, w=8):
        super().__init__()
        self.reduce = unit(c, mid, 1)
        self.d2, self.d4, self.d8 = unit(mid, w, 3, 2), unit(mid, w, 3, 4), unit(mid, w, 3, 8)
        self.out = nn.Conv2d(mid + 3 * w, w, 1)

    def forward(self, x):
        x = self.reduce(x)
        return self.out(torch.cat([x, self.d2(x), self.d4(x), self.d8(x)], dim=1))


class SqueezeExcited(nn.Module):
    """Channels of the concatenation are weighted before the projection."""

    def __init__(self, c=16, w=8, rates=(1, 3, 6)):
        super().__init__()
        n = w * len(rates)
        self.branches = nn.ModuleList(unit(c, w, 1 if r == 1 else 3, r) for r in rates)
        self.se = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(n, n // 4, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(n // 4, n, 1),
            nn.Sigmoid(),
        )
        self.project = unit(n, w, 1)

    def forward(self, x):
        y = torch.cat([b(x) for b in self.branches], 1)
        return self.project(y * self.se(y))


class LinesInADecoder(nn.Module):
    """No module of its own: the pyramid is some lines of a decoder with a low-level feature."""

    def __init__(self, high=16, low=8, w=8, classes=5):
        super().__init__()
        self.low_conv = unit(low, 6, 1)
        self.b1, self.b2 = unit(high, w, 1), unit(high, w, 3, 6)
        self.b3, self.b4 = unit(high, w, 3, 12), unit(high, w, 3, 18)
        self.b5 = image_pool(high, w)
        self.merge = unit(5 * w, w, 1)
        self.refine = nn.Sequential(unit(w + 6, w), nn.Dropout(0.5), unit(w, w), nn.Dropout(0.1))
        self.classifier = nn.Conv2d(w, classes, 1)

    def forward(self, high, low):
        low = self.low_conv(low)
        g = F.interpolate(self.b5(high), high.shape[2:], mode="bilinear", align_corners=True)
        y = torch.cat((self.b1(high), self.b2(high), self.b3(high), self.b4(high), g), dim=1)
        y = self.merge(y)
        y = F.interpolate(y, size=low.shape[2:], mode="bilinear", align_corners=True)
        return self.classifier(self.refine(torch.cat((y, low), dim=1)))


class UpsampledClassifier(nn.Module):
    """Pyramid, classifier, and the result at the size of an image."""

    def __init__(self, c=16, w=8, classes=5):
        super().__init__()
        self.p1, self.p2, self.p3 = unit(c, w, 1), unit(c, w, 3, 2), unit(c, w, 3, 5)
        self.classifier = nn.Conv2d(3 * w, classes, 1)

    def forward(self, x, image):
        y = self.classifier(torch.cat([self.p1(x), self.p2(x), self.p3(x)], 1))
        y = F.interpolate(y, size=image.shape[-2:], mode="bilinear", align_corners=False)
        return y.softmax(dim=1)


class BranchMaps(nn.Module):
    """Returns each branch's map as well, in a tuple, a list or a dict."""

    def __init__(self, kind, c=16, w=8, rates=(1, 2, 4)):
        super().__init__()
        self.kind = kind
        self.branches = nn.ModuleList(unit(c, w, 3, r) for r in rates)
        self.project = nn.Conv2d(w * len(rates), w, 1)

    def forward(self, x):
        maps = [b(x) for b in self.branches]
        if self.kind is list:
            return maps
        out = self.project(torch.cat(maps, dim=1))
        if self.kind is tuple:
            return out, tuple(maps)
        return {"out": out, **{f"branch_{i}": m for i, m in enumerate(maps)}}


class TwoPyramids(nn.Module):
    """One at small rates, one at large rates, the second reads the first."""

    def __init__(self, c=16, w=8):
        super().__init__()
        self.small = nn.ModuleList(unit(c, w, 3, r) for r in (1, 2, 3))
        self.between = unit(3 * w, w, 1)
        self.large = nn.ModuleList(unit(w, w, 3, r) for r in (4, 6, 9))
        self.after = unit(3 * w, w, 1)

    def forward(self, x):
        x = self.between(torch.cat([m(x) for m in self.small], 1))
        return self.after(torch.cat([m(x) for m in self.large], 1))


class ParallelPyramids(nn.Module):
    """Two pyramids over one input, for two tasks: depth and classes."""

    def __init__(self, c=16, w=8):
        super().__init__()
        self.seg = nn.ModuleList(unit(c, w, 3, r) for r in (2, 4))
        self.depth = nn.ModuleList(unit(c, w, 3, r) for r in (3, 6))
        self.seg_out, self.depth_out = nn.Conv2d(2 * w, 5, 1), nn.Conv2d(2 * w, 1, 1)

    def forward(self, x):
        seg = self.seg_out(torch.cat([m(x) for m in self.seg], 1))
        depth = self.depth_out(torch.cat([m(x) for m in self.depth], 1))
        return seg, torch.sigmoid(depth)


class Siamese(nn.Module):
    """One pyramid, called on two images' features."""

    def __init__(self, c=16, w=8):
        super().__init__()
        self.aspp = Pyramid(c, w)
        self.head = nn.Conv2d(w, 1, 1)

    def forward(self, before, after):
        return self.head((self.aspp(before) - self.aspp(after)).abs())


class ChannelsLastCaller(nn.Module):
    """Tokens in, tokens out: the pyramid is between two permutes."""

    def __init__(self, c=16, w=16):
        super().__init__()
        self.d1, self.d3 = unit(c, w // 2, 3, 1), unit(c, w // 2, 3, 3)

    def forward(self, x):
        x = x.permute(0, 3, 1, 2)
        y = torch.cat([self.d1(x), self.d3(x)], dim=1)
        return y.permute(0, 2, 3, 1).contiguous()


class SevenBranches(nn.Module):
    """A text detector's: seven spatial branches, the pooled one, a residual."""

    def __init__(self, c=16, w=4, rates=(1, 2, 3, 4, 6, 8)):
        super().__init__()
        self.point = unit(c, w, 1)
        self.atrous = nn.ModuleList(unit(c, w, 3, r) for r in rates)
        self.pool = image_pool(c, w)
        self.out = conv_bn(8 * w, c, 1)

    def forward(self, x):
        parts = [self.point(x)]
        for m in self.atrous:
            parts.append(m(x))
        parts.append(self.pool(x).expand_as(parts[0]))
        return torch.relu_(self.out(torch.cat(parts, dim=1)).add_(x))


class SmallNetwork(nn.Module):
    """Encoder, pyramid and decoder in one, as course work has it."""

    def __init__(self, classes=5):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        self.layer = nn.Sequential(
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
        self.aspp = Pyramid(16, 8)
        self.head = nn.Conv2d(16, classes, 1)

    def forward(self, image):
        low = self.stem(image)
        y = self.aspp(self.layer(low))
        y = F.interpolate(y, size=low.shape[2:], mode="bilinear", align_corners=False)
        y = self.head(torch.cat([y, low], dim=1))
        return {"out": F.interpolate(y, size=image.shape[2:], mode="bilinear")}


class WithCoordinates(nn.Module):
    """Coordinates are joined to the input before the branches read it."""

    def __init__(self, c=16, w=8, rates=(1, 2, 4)):
        super().__init__()
        self.branches = nn.ModuleList(unit(c + 2, w, 3, r) for r in rates)

    def forward(self, x):
        n, _, h, w = x.shape
        ys = torch.linspace(-1, 1, h, device=x.device, dtype=x.dtype).view(1, 1, h, 1)
        xs = torch.linspace(-1, 1, w, device=x.device, dtype=x.dtype).view(1, 1, 1, w)
        x = torch.cat([x, ys.expand(n, 1, h, w), xs.expand(n, 1, h, w)], dim=1)
        return torch.cat([b(x) for b in self.branches], dim=1)


class GatedBranches(nn.Module):
    """Soft attention over branches: every branch is computed and weighted."""

    def __init__(self, c=16, w=8, rates=(1, 3, 6)):
        super().__init__()
        self.branches = nn.ModuleList(unit(c, w, 3, r) for r in rates)
        self.gate = nn.Conv2d(c, len(rates), 1)

    def forward(self, x):
        gates = self.gate(x).softmax(dim=1)
        y = torch.stack([b(x) for b in self.branches], dim=1)
        return (y * gates.unsqueeze(2)).sum(dim=1)


class AuxiliaryOutput(nn.Module):
    """Two results, in training and in evaluation alike."""

    def __init__(self, c=16, w=8, classes=5):
        super().__init__()
        self.aspp = Pyramid(c, w)
        self.head = nn.Conv2d(w, classes, 1)
        self.aux = nn.Sequential(unit(c, 4), nn.Dropout(0.1), nn.Conv2d(4, classes, 1))

    def forward(self, x):
        return {"out": self.head(self.aspp(x)), "aux": self.aux(x)}


class EfficientPyramid(nn.Module):
    """ESPNet: branches of a narrowed map, each added to the sum of those before, then joined."""

    def __init__(self, c=16, w=4, rates=(1, 2, 4, 8)):
        super().__init__()
        self.reduce = nn.Conv2d(c, w, 1, bias=False)
        self.dilated = nn.ModuleList(
            nn.Conv2d(w, w, 3, padding=r, dilation=r, bias=False) for r in rates
        )
        self.bn_act = nn.Sequential(nn.BatchNorm2d(w * len(rates)), nn.PReLU(w * len(rates)))

    def forward(self, x):
        narrow = self.reduce(x)
        outputs = [self.dilated[0](narrow)]
        for conv in self.dilated[1:]:
            outputs.append(outputs[-1] + conv(narrow))
        return self.bn_act(torch.cat(outputs, dim=1) + x)


class ReturnsSizes(nn.Module):
    """Numbers beside the result, for whoever upsamples it."""

    def __init__(self, c=16, w=8):
        super().__init__()
        self.aspp = Pyramid(c, w)

    def forward(self, x):
        height, width = x.shape[2:]
        return self.aspp(x), (height * 4, width * 4)


class WholeInOneExpression(nn.Module):
    def __init__(self, c=16, w=8):
        super().__init__()
        self.b = nn.ModuleList([unit(c, w, 1), unit(c, w, 3, 2), unit(c, w, 3, 4)])
        self.p = nn.Sequential(nn.Conv2d(4 * w, w, 1), nn.BatchNorm2d(w), nn.PReLU())
        self.g = image_pool(c, w)

    def forward(self, x):
        return self.p(torch.cat([f(x) for f in self.b] + [self.g(x) + 0 * self.b[0](x)], 1))


LOW = (2, 8, 26, 30)

AROUND = {
    "pyramid": Case(Pyramid, ONE, "an ordinary one"),
    "residual": Case(Residual, ONE, "x + aspp(x)"),
    "reduced_first": Case(
        ReducedFirst, ((2, 32, 13, 15),), "a 1x1 before; its result is joined as well"
    ),
    "squeeze_excited": Case(SqueezeExcited, ONE, "squeeze and excitation after the cat"),
    "lines_in_a_decoder": Case(LinesInADecoder, (MAP, LOW), "lines in a decoder, two arguments"),
    "upsampled_classifier": Case(
        UpsampledClassifier, (MAP, (2, 3, 52, 60)), "no projection but a classifier; softmax"
    ),
    "returns_tuple": Case(
        lambda: BranchMaps(tuple), ONE, "branch maps in a tuple beside the result"
    ),
    "returns_list": Case(lambda: BranchMaps(list), ONE, "branch maps in a list, no cat"),
    "returns_dict": Case(lambda: BranchMaps(dict), ONE, "branch maps in a dict"),
    "two_pyramids": Case(TwoPyramids, ONE, "a pyramid reads a pyramid"),
    "parallel_pyramids": Case(ParallelPyramids, ONE, "two pyramids read one input, for two tasks"),
    "siamese": Case(Siamese, (MAP, MAP), "one pyramid, called twice in a forward"),
    "channels_last_caller": Case(
        ChannelsLastCaller, ((2, 13, 15, 16),), "the argument is N, H, W, C; permutes around"
    ),
    "seven_branches": Case(SevenBranches, ONE, "seven branches, pool, residual in place"),
    "small_network": Case(SmallNetwork, ((2, 3, 52, 60),), "the pyramid inside a network"),
    "with_coordinates": Case(WithCoordinates, ONE, "coordinates joined to the input"),
    "gated_branches": Case(GatedBranches, ONE, "softmax gates; all branches are computed"),
    "auxiliary_output": Case(AuxiliaryOutput, ONE, "two results in a dict, in both modes"),
    "efficient_pyramid": Case(EfficientPyramid, ONE, "ESPNet: sums of the first, two, three..."),
    "returns_sizes": Case(ReturnsSizes, ONE, "integers in what it returns"),
    "one_expression": Case(
        WholeInOneExpression, ONE, "a branch's unit runs twice, the second time to spread the pool"
    ),
}
