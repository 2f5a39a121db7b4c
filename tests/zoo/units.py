# SPDX-License-Identifier: BSD-3-Clause
"""The few lines that every repository has: convolution, norm, ReLU; pooling, the same."""

from __future__ import annotations

import torch
import torch.nn as nn


def conv_bn(cin, cout, k=3, rate=1, bias=False):
    return nn.Sequential(
        nn.Conv2d(cin, cout, k, padding=rate * (k // 2), dilation=rate, bias=bias),
        nn.BatchNorm2d(cout),
    )


def unit(cin, cout, k=3, rate=1, bias=False):
    return nn.Sequential(*conv_bn(cin, cout, k, rate, bias), nn.ReLU())


def image_pool(cin, cout):
    return nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), *unit(cin, cout, 1))


class Branches(nn.Module):
    """An ordinary pyramid, whose forward the others replace."""

    def __init__(self, c=16, w=8, rates=(1, 3, 6)):
        super().__init__()
        self.branches = nn.ModuleList(unit(c, w, 3, r) for r in rates)
        self.project = unit(w * len(rates), w, 1)

    def join(self, ys):
        return self.project(torch.cat(ys, dim=1))

    def forward(self, x):
        return self.join([branch(x) for branch in self.branches])
