# SPDX-License-Identifier: BSD-3-Clause
"""What only looks like a pyramid: other borders, other convolutions, weights that are computed."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations, parametrize

from tests.zoo.case import ONE, Case


class Bordered(nn.Module):
    """Atrous branches whose borders are no zeros."""

    def __init__(self, mode, c=16, w=8, rates=(1, 2, 4)):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(c, w, 3, padding=r, dilation=r, padding_mode=mode) for r in rates
        )

    def forward(self, x):
        return torch.cat([F.relu(conv(x)) for conv in self.convs], 1)


class PaddedBy(nn.Module):
    """F.pad with ones, with copies of the edge, or on one side alone."""

    def __init__(self, how, c=16, w=8, rates=(1, 2, 4)):
        super().__init__()
        self.how, self.rates = how, rates
        self.convs = nn.ModuleList(nn.Conv2d(c, w, 3, dilation=r) for r in rates)

    def pad(self, x, r):
        if self.how == "causal":
            return F.pad(x, (2 * r, 0, 2 * r, 0))
        if self.how == "ones":
            return F.pad(x, (r, r, r, r), value=1.0)
        return F.pad(x, (r, r, r, r), mode=self.how)

    def forward(self, x):
        pairs = zip(self.convs, self.rates, strict=True)
        return torch.cat([conv(self.pad(x, r)) for conv, r in pairs], dim=1)


class Convolutions(nn.Module):
    """Branches of any convolution, joined."""

    def __init__(self, convs):
        super().__init__()
        self.convs = nn.ModuleList(convs)

    def forward(self, x):
        return torch.cat([F.relu(conv(x)) for conv in self.convs], dim=1)


def strided():
    return Convolutions(nn.Conv2d(16, 8, 3, 2, padding=r, dilation=r) for r in (1, 2, 4))


def even_kernels():
    return Convolutions(
        nn.Conv2d(16, 8, k, padding="same", dilation=r) for k, r in ((2, 1), (2, 3), (4, 3))
    )


def transposed():
    return Convolutions(nn.ConvTranspose2d(16, 8, 3, padding=r, dilation=r) for r in (1, 2, 4))


def volumes():
    return Convolutions(nn.Conv3d(8, 4, 3, padding=r, dilation=r) for r in (1, 2, 3))


def series():
    return Convolutions(nn.Conv1d(16, 8, 3, padding=r, dilation=r) for r in (1, 2, 4))


def weight_normed():
    return Convolutions(
        parametrizations.weight_norm(nn.Conv2d(16, 8, 3, padding=r, dilation=r)) for r in (1, 2, 4)
    )


def spectral():
    return Convolutions(
        parametrizations.spectral_norm(nn.Conv2d(16, 8, 3, padding=r, dilation=r))
        for r in (1, 2, 4)
    )


class Symmetric(nn.Module):
    def forward(self, weight):
        return 0.5 * (weight + weight.flip(-1))


def parametrized():
    convs = [nn.Conv2d(16, 8, 3, padding=r, dilation=r) for r in (1, 2, 4)]
    for conv in convs:
        parametrize.register_parametrization(conv, "weight", Symmetric())
    return Convolutions(convs)


class StandardisedConv2d(nn.Conv2d):
    """Weights of mean 0 and variance 1, worked out in each call."""

    def forward(self, x):
        w = self.weight
        w = w - w.mean(dim=(1, 2, 3), keepdim=True)
        w = w / (w.std(dim=(1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class EqualisedConv2d(nn.Conv2d):
    """StyleGAN's: weights times a constant in forward."""

    def forward(self, x):
        gain = (self.weight[0].numel()) ** -0.5
        return F.conv2d(x, self.weight * gain, self.bias, 1, self.padding, self.dilation)


class MaskedConv2d(nn.Conv2d):
    """PixelCNN's: later taps are masked."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        mask = torch.ones(3, 3)
        mask[1, 2:] = 0
        mask[2] = 0
        self.register_buffer("mask", mask)

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class ScaledInputConv2d(nn.Conv2d):
    """Its forward does something else first."""

    def forward(self, x):
        return super().forward(x / (x.abs().amax(dim=1, keepdim=True) + 1.0))


def pyramid_of(conv, c=16, w=8, rates=(1, 2, 4)):
    return Convolutions(conv(c, w, 3, padding=r, dilation=r) for r in rates)


class KernelSharing(nn.Module):
    """KSAC: one kernel at several rates, a norm for each."""

    def __init__(self, c=16, w=8, rates=(6, 12, 18)):
        super().__init__()
        self.rates = rates
        self.weight = nn.Parameter(torch.empty(w, c, 3, 3))
        nn.init.kaiming_normal_(self.weight)
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) for _ in rates)

    def forward(self, x):
        ys = []
        for rate, norm in zip(self.rates, self.norms, strict=True):
            ys.append(F.relu(norm(F.conv2d(x, self.weight, padding=rate, dilation=rate))))
        return sum(ys)


class DynamicKernels(nn.Module):
    """Weights are worked out from the input: a mixture of experts for each sample."""

    def __init__(self, c=16, w=8, rates=(1, 3), experts=2):
        super().__init__()
        self.rates = rates
        self.banks = nn.ParameterList(
            nn.Parameter(torch.randn(experts, w, c, 3, 3) * 0.1) for _ in rates
        )
        self.route = nn.Linear(c, experts)

    def forward(self, x):
        shares = torch.softmax(self.route(x.mean((0, 2, 3))), dim=-1)
        ys = []
        for bank, r in zip(self.banks, self.rates, strict=True):
            weight = torch.einsum("e,eoihw->oihw", shares, bank)
            ys.append(F.relu(F.conv2d(x, weight, padding=r, dilation=r)))
        return torch.cat(ys, dim=1)


class CroppedToSmallest(nn.Module):
    """A padding of 1 at every rate: maps shrink and are cropped to the smallest."""

    def __init__(self, c=16, w=8, rates=(1, 2, 3)):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, w, 3, padding=1, dilation=r) for r in rates)

    def forward(self, x):
        ys = [conv(x) for conv in self.convs]
        h, w = ys[-1].shape[2:]
        return torch.cat([y[:, :, :h, :w] for y in ys], dim=1)


class CroppedOffCentre(nn.Module):
    """Twice the padding and a crop at the top left: branches are shifted."""

    def __init__(self, c=16, w=8, rates=(1, 2, 3)):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, w, 3, padding=2 * r, dilation=r) for r in rates)

    def forward(self, x):
        h, w = x.shape[2:]
        return torch.cat([conv(x)[..., :h, :w] for conv in self.convs], dim=1)


def bordered(mode: str) -> Case:
    return Case(lambda: Bordered(mode), ONE, f"padding_mode={mode!r}", pyramid=False)


def padded(how: str, remark: str) -> Case:
    return Case(lambda: PaddedBy(how), ONE, remark, pyramid=False)


def other(make, remark: str, shapes=ONE, list_input=False) -> Case:
    return Case(make, shapes, remark, pyramid=False, list_input=list_input)


LAYERS = {
    "circular": bordered("circular"),
    "reflect": bordered("reflect"),
    "replicate": bordered("replicate"),
    "padded_replicate": padded("replicate", "F.pad with copies of the edge"),
    "padded_ones": padded("ones", "F.pad with ones"),
    "padded_causal": padded("causal", "F.pad on two sides only: taps look up and left"),
    "strided": other(strided, "stride 2: the map shrinks"),
    "even_kernels": other(even_kernels, 'even kernels with padding="same": uneven borders'),
    "transposed": other(transposed, "ConvTranspose2d"),
    "volumes": other(volumes, "Conv3d", ((2, 8, 5, 7, 9),)),
    "series": other(series, "Conv1d", ((2, 16, 40),)),
    "cropped_to_smallest": other(CroppedToSmallest, "padding of 1: maps shrink, then a crop"),
    "cropped_off_centre": other(CroppedOffCentre, "too much padding and a crop: a shift"),
    "weight_norm": other(weight_normed, "weight_norm computes the weights"),
    "spectral_norm": other(spectral, "spectral_norm computes the weights, keeps state in training"),
    "parametrized": other(parametrized, "a parametrization computes the weights"),
    "standardised": other(lambda: pyramid_of(StandardisedConv2d), "standardised weights"),
    "equalised": other(lambda: pyramid_of(EqualisedConv2d), "weights times a constant in forward"),
    "masked": other(lambda: pyramid_of(MaskedConv2d), "weights times a mask in forward"),
    "scaled_input": other(
        lambda: pyramid_of(ScaledInputConv2d), "a Conv2d subclass that rescales its input"
    ),
    "dynamic_kernels": other(DynamicKernels, "weights made from the input"),
    "kernel_sharing": other(
        KernelSharing, "KSAC: one kernel at several rates, a pyramid of shared weights"
    ),
}
