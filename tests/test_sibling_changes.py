# SPDX-License-Identifier: BSD-3-Clause
"""What changes between the calls of siblings: nobody gets what was computed before."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from sibling_modules import CHANNELS, Convolutions, both, check_alike, maps, together
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["together"]


def write_to_map(module: Convolutions, x: Tensor) -> None:
    x.mul_(2)


def write_to_a_view(module: Convolutions, x: Tensor) -> None:
    x.detach()[:, :2].zero_()


def write_to_weight(module: Convolutions, x: Tensor) -> None:
    with torch.no_grad():
        module.b.weight.mul_(2)


def replace_weight(module: Convolutions, x: Tensor) -> None:
    module.b.weight = nn.Parameter(module.b.weight * 2)


def replace_weight_s_data(module: Convolutions, x: Tensor) -> None:
    module.b.weight.data = module.b.weight.data * 2


def write_to_bias(module: Convolutions, x: Tensor) -> None:
    with torch.no_grad():
        module.b.bias.add_(1)


def drop_bias(module: Convolutions, x: Tensor) -> None:
    module.b.bias = None


def other_rate(module: Convolutions, x: Tensor) -> None:
    module.b.dilation = module.b.padding = (5, 5)


def other_padding(module: Convolutions, x: Tensor) -> None:
    module.b.padding = (1, 1)


def other_stride(module: Convolutions, x: Tensor) -> None:
    module.b.stride = (2, 2)


def other_kernel(module: Convolutions, x: Tensor) -> None:
    torch.manual_seed(1)
    module.b.weight = nn.Parameter(torch.randn(8, CHANNELS, 1, 1, dtype=torch.float64))
    module.b.padding = (0, 0)


def wrap_around(module: Convolutions, x: Tensor) -> None:
    def wrapped(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = F.pad(x, (2, 2, 2, 2), mode="circular")
        return F.conv2d(x, weight, bias, dilation=2)

    module.b._conv_forward = types.MethodType(wrapped, module.b)


def hook(module: Convolutions, x: Tensor) -> None:
    module.b.register_forward_hook(lambda conv, inputs, y: y * 2)


def hook_before(module: Convolutions, x: Tensor) -> None:
    module.b.register_forward_pre_hook(lambda conv, inputs: inputs[0] * 2)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrise(module: Convolutions, x: Tensor) -> None:
    parametrize.register_parametrization(module.b, "weight", Doubled())


CHANGES = [
    *(write_to_map, write_to_a_view, write_to_weight, replace_weight, replace_weight_s_data),
    *(write_to_bias, drop_bias, other_rate, other_padding, other_stride, other_kernel),
    *(wrap_around, hook, hook_before, parametrise),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_changes_between_the_calls(change: Callable[..., object], grad: bool) -> None:
    plain, fused = both(change)
    with torch.set_grad_enabled(grad):
        check_alike(plain, fused)  # it happens for the first time
        check_alike(plain, fused)  # and has happened


@pytest.mark.parametrize("change", [write_to_map, write_to_a_view])
def test_inference_tensors_are_read(change: Callable[..., object], together: list[int]) -> None:
    plain, fused = both(change)
    quiet = both()
    with torch.inference_mode():
        check_alike(plain, fused)
        assert together == [3]
        check_alike(*quiet)
        check_alike(*quiet)
        assert together == [3, 3, 3]
        for module in quiet:
            module.load_state_dict({k: v.clone() for k, v in plain.state_dict().items()})
        check_alike(*quiet)


def test_inference_weights_are_read(together: list[int]) -> None:
    with torch.inference_mode():
        plain, fused = both(write_to_weight)
        check_alike(plain, fused)
        check_alike(plain, fused)
    assert together == [3, 3]


def under_autocast(module: Convolutions, x: Tensor) -> None:
    torch.set_autocast_enabled("cpu", True)


@pytest.mark.parametrize(
    ("before", "between"),
    [
        (lambda: None, lambda module, x: torch.set_grad_enabled(False)),
        (lambda: torch.set_grad_enabled(False), lambda module, x: torch.set_grad_enabled(True)),
        (lambda: None, under_autocast),
        (
            lambda: torch.set_autocast_enabled("cpu", True),
            lambda module, x: torch.set_autocast_enabled("cpu", False),
        ),
        (
            lambda: torch.set_autocast_enabled("cpu", True),
            lambda module, x: torch.set_autocast_dtype("cpu", torch.float16),
        ),
    ],
    ids=["no_grad", "grad", "autocast", "no autocast", "another dtype"],
)
def test_modes_that_change_between_the_calls(
    before: Callable[[], object], between: Callable[..., object]
) -> None:
    found: list[list[Tensor]] = []
    x = maps().float()
    for module in both(between):
        dtype = torch.get_autocast_dtype("cpu")
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            before()
            found.append(module.float()(x))
            torch.set_autocast_dtype("cpu", dtype)
    for got, expected in zip(found[1], found[0], strict=True):
        assert (got.dtype, got.requires_grad) == (expected.dtype, expected.requires_grad)
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)


def test_autocast(together: list[int]) -> None:
    plain, fused = (module.float() for module in both())
    with torch.autocast("cpu", torch.bfloat16):
        check_alike(plain, fused, maps().float(), rtol=0.02, atol=0.02)
        assert together == [3]
        grads = []
        x = maps().float()
        for module in (plain, fused):
            sum(y.float().square().sum() for y in module(x)).backward()
            grads.append({name: p.grad for name, p in module.named_parameters()})
    for name, grad in grads[0].items():
        assert grads[1][name].dtype == grad.dtype
        assert (grads[1][name] - grad).norm() < 0.02 * grad.norm(), name
