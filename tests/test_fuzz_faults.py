# SPDX-License-Identifier: BSD-3-Clause
"""What the fuzzer of the promises is for: faults that are planted, each of which it has to find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fuzz_modules
import pytest
import torch
from fuzz_checks import memory_format_of
from test_fuzz_promises import MAKERS, run
from torch import Tensor

import aspp_ext

NAMES = ("atrous_pyramid", "atrous_separable_pyramid", "atrous_separable_conv2d", "aspp_inference")
Fault = Callable[[Tensor, Tensor], Any]
"""Gets an operator's result and its x, and changes one of them or returns another result."""


def a_last_bit(y: Tensor, x: Tensor) -> Tensor:
    """Of one pixel."""
    off = torch.ones_like(y)
    off[..., -1] += 2 * torch.finfo(y.dtype).eps
    return y * off


def swapped_channels(y: Tensor, x: Tensor) -> Tensor:
    order = [1, 0, *range(2, y.size(1))] if y.size(1) > 1 else [0]
    layout = memory_format_of(y) if y.dim() == 4 else None
    return y[:, order].contiguous(memory_format=layout or torch.contiguous_format)


def relative_to_the_largest(y: Tensor, x: Tensor) -> Tensor:
    """As of sums of neighbours from which these are subtracted again; integers stay exact."""
    if not y.numel() or (y == y.round()).all():
        return y
    largest = torch.where(y.isfinite(), y, 0).detach().abs().max()
    return y + largest * torch.finfo(y.dtype).eps


def nan_for_the_batch(y: Tensor, x: Tensor) -> Tensor:
    return y * torch.nan if y.isnan().any() else y


def infinity_lost(y: Tensor, x: Tensor) -> Tensor:
    return torch.where(y.isinf(), torch.nan, y)


def wrong_gradient(y: Tensor, x: Tensor) -> None:
    if y.requires_grad:
        y.register_hook(lambda grad: grad * 1.001)


def other_format(y: Tensor, x: Tensor) -> Tensor:
    return y.contiguous()


def other_dtype(y: Tensor, x: Tensor) -> Tensor:
    return y.float()


def written_argument(y: Tensor, x: Tensor) -> None:
    x.untyped_storage().fill_(1)


def other_bits_again(y: Tensor, x: Tensor) -> Tensor:
    return y * (1 + 1e-3 * torch.rand(1).item())


FAULTS: dict[Fault, str] = {
    a_last_bit: "integers",
    swapped_channels: "integers|the error allowed",
    relative_to_the_largest: "the error allowed|an error of|integers",
    nan_for_the_batch: "nan for",
    infinity_lost: "nan for -?inf",
    wrong_gradient: "gradient",
    other_format: "an operand is channels_last",
    other_dtype: "dtype torch.float32",
    written_argument: "an argument was written to|other bits",
    other_bits_again: "other bits",
}


def planted(fault: Fault, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def faulty(x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        y = call(x, *arguments, **keywords)
        changed = fault(y, x)
        return y if changed is None else changed

    return faulty


def run_all(kind: str, count: int) -> None:
    for number in range(count):
        run(kind, number)


@pytest.mark.parametrize("kind", ["dense", "separable", "head"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faults_of_operators_are_found(fault: Fault, kind: str, monkeypatch) -> None:
    for name in NAMES:
        monkeypatch.setattr(aspp_ext, name, planted(fault, getattr(aspp_ext, name)))
    with pytest.raises(AssertionError, match=f"^{kind}.*: .*({FAULTS[fault]})"):
        run_all(kind, 400)


def frozen(twins: fuzz_modules.Twins) -> None:
    aspp_ext.freeze(twins.ours)


def other_momentum(twins: fuzz_modules.Twins) -> None:
    fuzz_modules.norms(twins.ours)[1].momentum = 0.2


def other_weight(twins: fuzz_modules.Twins) -> None:
    next(twins.ours.parameters()).data[-1] *= 1.01


MODULE_FAULTS = {
    frozen: "error allowed|off by",
    other_momentum: "running_mean",
    other_weight: "error allowed|off by|running_mean",
}


@pytest.mark.parametrize("fault", MODULE_FAULTS, ids=lambda fault: fault.__name__)
def test_faults_of_modules_are_found(fault: Any, monkeypatch) -> None:
    made = MAKERS["module"]

    def faulty(d: Any) -> fuzz_modules.Twins:
        twins = made(d)
        fault(twins)
        return twins

    monkeypatch.setitem(MAKERS, "module", faulty)
    with pytest.raises(AssertionError, match=f"(?s)^module.*: .*({MODULE_FAULTS[fault]})"):
        run_all("module", 200)
