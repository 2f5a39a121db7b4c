# SPDX-License-Identifier: BSD-3-Clause
"""Whole modules on Triton's kernels, run by its interpreter."""

from __future__ import annotations

import pytest
import torch
from aspp_pairs import (
    CHANNELS,
    PAIRS,
    WIDTH,
    assert_all_close,
    features,
    randomise,
    torchvision_aspp,
)
from aspp_pairs import train_step as step
from marks import on_interpreted
from pretending import Calls
from torch import Tensor, nn

from aspp_ext.fuse import fuse

pytestmark = on_interpreted
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
DENSE = {"atrous_pyramid_statistics_triton", "atrous_pyramid_triton"}
GRADIENTS = {"atrous_pyramid_grad_input_triton", "atrous_pyramid_grad_weight_triton"}
SEPARABLE = {"atrous_separable_pyramid_triton", "atrous_separable_pyramid_backward_triton"}


def without_dropout(*modules: nn.Module) -> None:
    """Which elements it drops depends on the memory format."""
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, nn.Dropout):
                layer.eval()


def both(name: str) -> tuple[nn.Module, nn.Module]:
    original, ours = (module.float() for module in PAIRS[name].build())
    without_dropout(original, ours)
    return original, ours


def ran(calls: Calls) -> set[str]:
    """What has run, all of it Triton's but for the sums of norms."""
    names = {name for name in calls.names if not name.startswith("channel_")}
    assert all(name.endswith("_triton") for name in names)
    return names


@pytest.mark.quick(when=lambda name: name.startswith("ours"))
@pytest.mark.parametrize("name", PAIRS)
def test_training_step(name) -> None:
    original, ours = both(name)
    x = features().float()
    with Calls() as calls:
        got = step(ours, x)
    assert_all_close(got, step(original, x), **CLOSE)
    separable = "separable" in name
    assert ran(calls) >= (SEPARABLE if separable else {"atrous_pyramid_statistics_triton"})
    assert separable or ran(calls) >= GRADIENTS


@pytest.mark.quick(when=lambda name: name.startswith("fused"))
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_inference(name, layout) -> None:
    original, ours = both(name)
    x = features().float().contiguous(memory_format=layout)
    with torch.no_grad(), Calls() as calls:
        y = ours.eval()(x)
        torch.testing.assert_close(y, original.eval()(x), **CLOSE)
    assert ran(calls) & (SEPARABLE | DENSE)


def test_under_autocast() -> None:
    original, ours = both("ours dense")
    x = features().float()
    with torch.no_grad():
        exact = original.eval()(x)
        with torch.autocast("cpu", torch.bfloat16):
            low, got = original(x), ours.eval()(x)
    assert got.dtype == torch.bfloat16
    assert (got - exact).abs().max() <= 2 * (low - exact).abs().max() + 2**-7 * exact.abs().max()


class Model(nn.Module):
    """A backbone of one layer and a head of torchvision's kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, stride=4, padding=1)
        self.head = nn.Sequential(torchvision_aspp(), nn.Conv2d(WIDTH, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(self.head(self.stem(x)), x.shape[-2:], mode="bilinear")


def test_a_fused_model_learns_the_same() -> None:
    """Two steps of SGD, then an evaluation with the statistics that were gathered."""
    torch.manual_seed(0)
    original = randomise(Model())
    ours = Model()
    ours.load_state_dict(original.state_dict())
    fuse(ours)
    without_dropout(original, ours)
    x, labels = torch.randn(2, 3, 32, 36), torch.randint(0, 3, (2, 32, 36))
    losses = []
    with Calls() as calls:
        for model in (original, ours):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            for _ in range(2):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), labels)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            with torch.no_grad():
                losses.append(model.eval()(x))
    assert ran(calls) >= GRADIENTS | DENSE
    torch.testing.assert_close(losses[3:], losses[:3], rtol=1e-3, atol=1e-4)
    assert losses[1] < losses[0]
