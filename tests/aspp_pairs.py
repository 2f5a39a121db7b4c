# SPDX-License-Identifier: BSD-3-Clause
"""The ASPP modules under test: each fused one beside the original that it must equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aspp_ext.compat import import_torchvision
from aspp_ext.fuse import fuse
from aspp_ext.modules import ASPP

import_torchvision()

# ruff: noqa: E402
from torchvision.models.segmentation import deeplabv3 as torchvision
from torchvision.models.segmentation import deeplabv3_resnet50

try:
    import segmentation_models_pytorch as smp_models
    from segmentation_models_pytorch.decoders.deeplabv3 import decoder as smp
except ImportError:  # a GPU machine without it still tests the other pairs
    smp_models = smp = None

__all__ = ["deeplabv3_resnet50", "smp", "smp_models", "torchvision"]

CHANNELS, WIDTH, RATES = 12, 8, (1, 3, 9)  # rate 9 leaves the 7 x 9 map with its centre tap only
TIGHT = {"rtol": 1e-10, "atol": 1e-11}


class Pair(NamedTuple):
    """Builders of an original module and of ours; both get the original's state."""

    original: Callable[[], nn.Module]
    ours: Callable[[], nn.Module]

    def build(self, seed: int = 0) -> tuple[nn.Module, nn.Module]:
        """Both modules in train mode, in float64, with the same random state."""
        original = randomise(self.original(), seed).double()
        ours = self.ours().double()
        ours.load_state_dict(original.state_dict(), strict=True)
        return original, ours


def torchvision_aspp() -> nn.Module:
    return torchvision.ASPP(CHANNELS, RATES, WIDTH)


def smp_aspp(separable: bool) -> nn.Module:
    return smp.ASPP(CHANNELS, WIDTH, RATES, separable, 0.5)


_ALL_PAIRS = {
    "ours dense": Pair(torchvision_aspp, lambda: ASPP(CHANNELS, RATES, WIDTH)),
    "ours separable": Pair(
        lambda: smp_aspp(True), lambda: ASPP(CHANNELS, RATES, WIDTH, separable=True)
    ),
    "fused torchvision": Pair(torchvision_aspp, lambda: fuse(torchvision_aspp())),
    "fused smp dense": Pair(lambda: smp_aspp(False), lambda: fuse(smp_aspp(False))),
    "fused smp separable": Pair(lambda: smp_aspp(True), lambda: fuse(smp_aspp(True))),
}
OF_SMP = ("ours separable", "fused smp dense", "fused smp separable")
PAIRS = {name: pair for name, pair in _ALL_PAIRS.items() if smp is not None or name not in OF_SMP}


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give the norms inside statistics and affine parameters that are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data.uniform_(0.5, 1.5, generator=generator)
            norm.bias.data.uniform_(-0.5, 0.5, generator=generator)
            norm.running_mean.uniform_(-0.5, 0.5, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
    return module


def features(n: int = 2, seed: int = 0, height: int = 7, width: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, CHANNELS, height, width, generator=generator, dtype=torch.float64)


def train_step(module: nn.Module, x: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Output, gradients and the buffers after one step, dropout drawn from ``seed``."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = module(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    found = {"y": y.detach(), "x.grad": x.grad}
    found |= {f"{name}.grad": p.grad for name, p in module.named_parameters()}
    return found | {name: b.clone() for name, b in module.named_buffers()}


def assert_all_close(got: dict[str, Tensor], expected: dict[str, Tensor], **tolerance) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
