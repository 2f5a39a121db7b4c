# SPDX-License-Identifier: BSD-3-Clause
"""What only looks like a pyramid: code that remembers, changes or hides something."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.ao.quantization import DeQuantStub, QuantStub
from torch.utils.checkpoint import checkpoint

from tests.zoo.case import ONE, Case
from tests.zoo.units import Branches, conv_bn


class Checkpointed(Branches):
    def forward(self, x):
        return self.join([checkpoint(branch, x, use_reentrant=False) for branch in self.branches])


class Hooked(Branches):
    """Hooks on inner layers: one changes a result, one changes an input."""

    def __init__(self):
        super().__init__()
        self.branches[0][0].register_forward_hook(lambda module, args, y: y * 2)
        self.branches[1].register_forward_pre_hook(lambda module, args: (args[0] - 1,))


class GradientHooked(Branches):
    """A hook on an inner layer that sees gradients only."""

    def __init__(self):
        super().__init__()
        self.branches[1].register_full_backward_hook(lambda module, gx, gy: (gx[0] * 0.5,))


class TensorHooked(Branches):
    """A hook on a tensor: a branch's gradient is made small."""

    def forward(self, x):
        ys = [branch(x) for branch in self.branches]
        if ys[2].requires_grad:
            ys[2].register_hook(lambda grad: grad * 0.1)
        return self.join(ys)


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


class GradientReversal(Branches):
    """The forward pass is a pyramid's; a branch's gradient has the other sign."""

    def forward(self, x):
        ys = [branch(x) for branch in self.branches]
        return self.join([ys[0], Reversal.apply(ys[1]), ys[2]])


class Counting(Branches):
    def __init__(self):
        super().__init__()
        self.calls, self.sizes = 0, []

    def forward(self, x):
        self.calls += 1
        self.sizes.append(tuple(x.shape))
        return super().forward(x)


class CountingInABuffer(Branches):
    """A buffer with the number of calls and one with a running mean of the result."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x):
        y = super().forward(x)
        self.steps += 1
        self.average.lerp_(y.detach().mean(dim=(0, 2, 3)).float(), 0.1)
        return y


class Remembering(Branches):
    """The result is averaged with that of the last call, as for a video."""

    def __init__(self):
        super().__init__()
        self.last = None

    def forward(self, x):
        y = super().forward(x)
        if self.last is not None and self.last.shape == y.shape:
            y = 0.5 * (y + self.last)
        self.last = y.detach()
        return y


class Keeping(Branches):
    """Keeps its branches' results as an attribute, for a loss elsewhere."""

    def forward(self, x):
        self.features = [branch(x) for branch in self.branches]
        return self.join(self.features)


class Autocast(Branches):
    def forward(self, x):
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            y = super().forward(x)
        return y.float()


class CastInside(Branches):
    """One branch in bfloat16 by casts of input and weights."""

    def forward(self, x):
        ys = [branch(x) for branch in self.branches]
        conv, norm, act = self.branches[1]
        y = F.conv2d(x.bfloat16(), conv.weight.bfloat16(), None, 1, conv.padding, conv.dilation)
        ys[1] = act(norm(y.to(x.dtype)))
        return self.join(ys)


class WithoutGradient(Branches):
    """A frozen branch, by a context."""

    def forward(self, x):
        with torch.no_grad():
            frozen = self.branches[0](x)
        return self.join([frozen, self.branches[1](x), self.branches[2](x)])


class Detached(Branches):
    def forward(self, x):
        ys = [branch(x) for branch in self.branches]
        return self.join([ys[0], ys[1].detach(), ys[2]])


class StraightThrough(Branches):
    """Rounded results, gradients as if they weren't."""

    def forward(self, x):
        y = super().forward(x)
        return y + (torch.round(y * 8) / 8 - y).detach()


class Complex(nn.Module):
    """Real and imaginary parts of one wave from two atrous convolutions."""

    def __init__(self, c=16, w=8):
        super().__init__()
        self.real, self.imaginary = conv_bn(c, w, 3, 2), conv_bn(c, w, 3, 4)

    def forward(self, x):
        return torch.complex(self.real(x), self.imaginary(x))


class ComplexWeights(nn.Module):
    """Complex parameters, so its maps are complex, too."""

    def __init__(self, c=16, w=8, rates=(1, 2, 4)):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(c, w, 3, padding=r, dilation=r, dtype=torch.complex64) for r in rates
        )

    def forward(self, x):
        x = x.to(torch.complex64)
        return torch.cat([conv(x) for conv in self.convs], 1).abs()


class Stubbed(Branches):
    """Ready to be quantised."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()

    def forward(self, x):
        return self.dequant(super().forward(self.quant(x)))


class FakeQuantised(Branches):
    """Weights and results on a grid of 256 values."""

    def forward(self, x):
        y = super().forward(x)
        return torch.fake_quantize_per_tensor_affine(y, 0.05, 0, 0, 255)


class InputReluAfterFirst(Branches):
    """The first branch reads x, the others what is left of it: a copy's ReLU in place."""

    def forward(self, x):
        x = x.clone()
        first = self.branches[0](x.clone())
        x.relu_()
        return self.join([first, self.branches[1](x), self.branches[2](x)])


class InputChangedInPlace(nn.Module):
    """A caller's tensor is added to between branches; inference alone, as autograd refuses."""

    def __init__(self, c=16, w=8, rates=(1, 3, 6)):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, w, 3, padding=r, dilation=r) for r in rates)

    def forward(self, x):
        ys = []
        for conv in self.convs:
            ys.append(conv(x))
            x += 0.5
        return torch.cat(ys, 1)


class PreActivation(nn.Module):
    """ReLU in place at the head of each branch: the caller's tensor loses its negatives."""

    def __init__(self, c=16, w=8, rates=(1, 3, 6)):
        super().__init__()
        self.first = nn.Conv2d(c, w, 1)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(c, w, 3, padding=r, dilation=r))
            for r in rates
        )

    def forward(self, x):
        return torch.cat([self.first(x)] + [branch(x) for branch in self.branches], dim=1)


class ViewChangedLater(Branches):
    """A view of a branch's result is halved before the branches are joined."""

    def forward(self, x):
        ys = [conv[1](conv[0](x)) for conv in self.branches]
        half = ys[0][:, :4]
        half.mul_(0.5)
        return self.join(ys)


class MomentumInForward(Branches):
    """A norm's momentum falls from call to call."""

    def forward(self, x):
        for branch in self.branches:
            branch[1].momentum = max(0.01, branch[1].momentum * 0.9)
        return super().forward(x)


class FrozenInForward(Branches):
    """Norms are put into evaluation in forward."""

    def forward(self, x):
        for branch in self.branches:
            branch[1].eval()
        return super().forward(x)


class WeightReplaced(Branches):
    """Weights are clipped in each forward; the first convolution gets a new Parameter."""

    def forward(self, x):
        with torch.no_grad():
            for branch in self.branches:
                branch[0].weight.clamp_(-0.1, 0.1)
        if self.training:
            self.project[0].weight = nn.Parameter(self.project[0].weight.detach() * 0.99)
        return super().forward(x)


def code(make, remark: str) -> Case:
    return Case(make, ONE, remark, pyramid=False)


EFFECTS = {
    "checkpointed": code(Checkpointed, "branches are checkpointed: hooks, less memory"),
    "hooked": code(Hooked, "hooks on inner layers change values"),
    "gradient_hooked": code(GradientHooked, "a module's backward hook changes gradients"),
    "tensor_hooked": code(TensorHooked, "a tensor's hook changes gradients"),
    "gradient_reversal": code(GradientReversal, "a Function of its own changes gradients alone"),
    "counting": code(Counting, "a counter and a list as attributes"),
    "counting_in_a_buffer": code(CountingInABuffer, "buffers that change in each call"),
    "remembering": code(Remembering, "a result depends on the call before"),
    "keeping": code(Keeping, "keeps the branches' results as an attribute"),
    "autocast": code(Autocast, "autocast inside forward"),
    "cast_inside": code(CastInside, "one branch in bfloat16"),
    "without_gradient": code(WithoutGradient, "torch.no_grad() around a branch"),
    "detached": code(Detached, "a branch is detached"),
    "straight_through": code(StraightThrough, "rounding with a straight-through gradient"),
    "complex": code(Complex, "two branches make a complex map"),
    "complex_weights": code(ComplexWeights, "complex convolutions"),
    "stubbed": code(Stubbed, "quantisation stubs around: what they become isn't known"),
    "fake_quantised": code(FakeQuantised, "the result is on a grid"),
    "input_relu_after_first": code(InputReluAfterFirst, "two inputs: before and after a ReLU"),
    "input_changed_in_place": code(InputChangedInPlace, "the input changes between branches"),
    "pre_activation": code(PreActivation, "ReLU in place on the input, in each branch"),
    "view_changed_later": code(ViewChangedLater, "a view of a branch changes before the cat"),
    "momentum_in_forward": code(MomentumInForward, "forward changes the norms' momentum"),
    "frozen_in_forward": code(FrozenInForward, "forward puts the norms into evaluation"),
    "weight_replaced": code(WeightReplaced, "forward clips weights, replaces a Parameter"),
}
