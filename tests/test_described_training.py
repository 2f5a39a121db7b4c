# SPDX-License-Identifier: BSD-3-Clause
"""Training a fused module is training the module: step by step the same, up to rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from aspp_ext.fuse import fuse
from tests.zoo.hand_written import HAND_WRITTEN
from tests.zoo.rebuilt import REBUILT

NAMES = (
    *("founding", "pyramid", "norm_group", "sum_in_place", "separable_norm_relu", "residual"),
    *("deeplab2", "paddleseg", "window_of_map_size", "norm_cumulative"),
)


def trained(module: nn.Module, maps: list[Tensor]) -> dict[str, Tensor]:
    """The state after a step with each of the maps."""
    optimizer = torch.optim.SGD(module.train().parameters(), 0.05, momentum=0.9)
    for i, x in enumerate(maps):
        torch.manual_seed(i)  # of dropouts
        optimizer.zero_grad()
        (module(x) - i % 3).square().mean().backward()
        optimizer.step()
    return {name: value.double() for name, value in module.state_dict().items()}


@pytest.mark.quick(when=lambda name: name == "founding")
@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps(name: str) -> None:
    case = (HAND_WRITTEN | REBUILT)[name]
    torch.manual_seed(0)
    plain = case.make()
    maps = [torch.randn(2, *case.shapes[0][1:]) for _ in range(20)]
    ours = fuse(copy.deepcopy(plain))
    exact = trained(copy.deepcopy(plain).double(), [x.double() for x in maps])
    fused_exact = trained(copy.deepcopy(ours).double(), [x.double() for x in maps])
    got, expected = trained(ours, maps), trained(plain, maps)
    for key, value in exact.items():
        torch.testing.assert_close(fused_exact[key], value, rtol=1e-8, atol=1e-9)
        # In float32 as far from that as PyTorch's own run, or as rounding makes a parameter.
        noise = (expected[key] - value).norm() + 1e-6 * value.norm() + 1e-6
        assert (got[key] - value).norm() <= 4 * noise, key
