# SPDX-License-Identifier: BSD-3-Clause
"""What only looks like a pyramid: code that decides, by sizes, values, modes or chance."""

from __future__ import annotations

import types

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.zoo.case import ONE, Case
from tests.zoo.units import Branches, image_pool, unit

FLAGS = {"wide": True}


class ByMapSize(Branches):
    """Large rates only where the map is large."""

    def forward(self, x):
        small = self.branches[0](x)
        if x.shape[-1] > 14:
            return self.join([small, self.branches[1](x), self.branches[2](x)])
        return self.join([small, small, small])


class RatesOfMapSize(nn.Module):
    """Rates are fractions of the height."""

    def __init__(self, c=16, w=8):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(w, c, 3, 3) * 0.1) for _ in "abc")

    def forward(self, x):
        ys = []
        for weight, part in zip(self.weights, (8, 4, 2), strict=True):
            rate = max(1, int(x.shape[2]) // part)
            ys.append(F.conv2d(x, weight, padding=rate, dilation=rate))
        return torch.cat(ys, 1)


class AdaptiveDilation(Branches):
    """Sets its convolutions' dilation in forward."""

    def forward(self, x):
        for i, branch in enumerate(self.branches):
            rate = (i + 1) * (1 if min(x.shape[2:]) < 32 else 2)
            branch[0].dilation = branch[0].padding = (rate, rate)
        return super().forward(x)


class BatchOfOne(Branches):
    """No norm on the pooled map of a batch of one, the usual way round its error."""

    def __init__(self, c=16, w=8):
        super().__init__(c, w)
        self.pool = image_pool(c, w)
        self.project = unit(4 * w, w, 1)

    def forward(self, x):
        g = self.pool[1](self.pool[0](x))
        if x.shape[0] > 1:
            g = self.pool[2](g)
        g = F.relu(g).expand(-1, -1, *x.shape[2:])
        return self.join([*(b(x) for b in self.branches), g])


class ByValues(Branches):
    def forward(self, x):
        ys = [branch(x) for branch in self.branches]
        if x.mean() > 0:
            ys.reverse()
        return self.join(ys)


class HardGate(Branches):
    """A learned gate chooses one branch."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 3)
        self.project = unit(8, 8, 1)

    def forward(self, x):
        choice = self.gate(x.mean(dim=(2, 3))).mean(0).argmax().item()
        return self.project(self.branches[choice](x))


class PerSample(Branches):
    """A loop over the batch; a sample with a huge value loses a branch."""

    def forward(self, x):
        ys = [branch(x) for branch in self.branches]
        last = []
        for i in range(x.shape[0]):
            huge = bool((x[i] > 3.5).any())
            last.append(torch.zeros_like(ys[2][i]) if huge else ys[2][i])
        return self.join([ys[0], ys[1], torch.stack(last)])


class ByGradMode(Branches):
    """Fewer branches where no gradient is asked for."""

    def forward(self, x):
        ys = [branch(x) for branch in self.branches]
        if not torch.is_grad_enabled():
            ys[1] = ys[0]
        return self.join(ys)


class ByExport(Branches):
    """Takes another way when it is exported or compiled."""

    def forward(self, x):
        if torch.compiler.is_compiling():
            return self.join([branch(x) for branch in self.branches])
        return self.join([branch(x).clamp(max=0.5) for branch in self.branches])


class ByFlag(Branches):
    """A global decides."""

    def forward(self, x):
        ys = [branch(x) for branch in self.branches]
        return self.join(ys) if FLAGS["wide"] else ys[0]


class ByDtype(Branches):
    """Clamps in one dtype alone."""

    def forward(self, x):
        y = super().forward(x)
        return y.clamp(max=1.0) if y.dtype == torch.float64 else y


class TrainingDiffers(Branches):
    def forward(self, x):
        ys = [branch(x) for branch in self.branches]
        y = self.join(ys)
        return (y, ys[1]) if self.training else y


class StochasticDepth(Branches):
    """In training a branch is left out at random."""

    def forward(self, x):
        ys = [branch(x) for branch in self.branches]
        if self.training:
            dropped = int(torch.randint(len(ys), ()))
            ys[dropped] = torch.zeros_like(ys[dropped])
        return self.join(ys)


class Noise(Branches):
    """Noise on the input of each branch in training."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        return self.join([b(x + 0.1 * torch.randn_like(x)) for b in self.branches])


class MonteCarloDropout(Branches):
    """Drops in evaluation, too, with another probability in each call."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout2d(0.1)

    def forward(self, x):
        self.drop.p = min(0.5, self.drop.p + 0.1)
        ys = [self.drop(branch(x)) for branch in self.branches]
        return F.dropout(self.join(ys), 0.1, training=True)


class Patched(Branches):
    """The instance's branch has a forward of its own."""

    def __init__(self):
        super().__init__()

        def forward(branch, x):
            return torch.sin(nn.Sequential.forward(branch, x))

        self.branches[1].forward = types.MethodType(forward, self.branches[1])


class Fallback(Branches):
    """Catches what fails and goes on without."""

    def forward(self, x):
        try:
            return super().forward(x)
        except RuntimeError:
            return self.join([self.branches[0](x)] * 3)


class OptionalArgument(Branches):
    """A mask may be given, and is looked at."""

    def forward(self, x, mask=None):
        y = super().forward(x)
        return y if mask is None or not bool(mask.any()) else y * mask


def code(make, remark: str) -> Case:
    return Case(make, ONE, remark, pyramid=False)


CHOICES = {
    "by_map_size": code(ByMapSize, "the map's width chooses branches"),
    "rates_of_map_size": code(RatesOfMapSize, "int() of the height gives the rates"),
    "adaptive_dilation": code(AdaptiveDilation, "forward sets its layers' dilation"),
    "batch_of_one": code(BatchOfOne, "the batch decides whether a norm is used"),
    "by_values": code(ByValues, "values of x choose the order"),
    "hard_gate": code(HardGate, "a gate's .item() chooses one branch"),
    "per_sample": code(PerSample, "a loop over the batch that looks at values"),
    "by_grad_mode": code(ByGradMode, "torch.is_grad_enabled() decides"),
    "by_export": code(ByExport, "computes something else while it is exported or compiled"),
    "by_flag": code(ByFlag, "a global decides what is returned"),
    "by_dtype": code(ByDtype, "the dtype decides whether to clamp"),
    "training_differs": code(TrainingDiffers, "returns a branch as well in training"),
    "stochastic_depth": code(StochasticDepth, "drops a branch at random in training"),
    "noise": code(Noise, "noise on each branch's input in training"),
    "monte_carlo_dropout": code(MonteCarloDropout, "dropout in evaluation, p grows by the call"),
    "patched": code(Patched, "an instance's own forward"),
    "fallback": code(Fallback, "try and except: another path after an error"),
    "optional_argument": code(OptionalArgument, "a path for an argument that isn't there"),
}
