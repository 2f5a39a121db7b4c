# SPDX-License-Identifier: BSD-3-Clause
"""What ``atrous_pyramid_statistics`` has to satisfy on a device that has kernels for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from table import FAMILY, LOW, dtype_id
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck

from aspp_ext.modules import layers
from aspp_ext.ops.pyramid_statistics import atrous_pyramid_statistics
from aspp_ext.testing import OPS, PROBLEMS, Branch, Problem
from aspp_ext.testing.checks import assert_statistics

PRECISIONS = [(d, False) for d in (torch.float32, torch.float64, *LOW)] + [(torch.float32, True)]
each_precision = pytest.mark.parametrize(
    ("dtype", "tf32"), PRECISIONS, ids=[f"{dtype_id(d)}{'-tf32' * t}" for d, t in PRECISIONS]
)
# Sums long enough to be sliced: what is summed up is the slices' sum.
SLICED = Problem("sliced", (1, 1024, 10, 9), (Branch(40, (1, 1)), Branch(40, (3, 3), (6, 6))))
FILLED = [*(p for p in PROBLEMS.values() if p.shape[0] > 0), SLICED]
each_filled = pytest.mark.parametrize("problem", FILLED, ids=lambda p: p.name)
# Enough for every kind of stride, size and tail; opcheck takes a while.
CHECKED = ("one_branch", "x_channels_last", "x_sliced", "weights_channels_last", "one_pixel")
CHECKED += ("in_place_channel_slice", "steps_not_taken_16")


def operator() -> Any:
    return FAMILY.op("atrous_pyramid_statistics")


def arguments(problem: Problem, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """x, weights and rates."""
    return OPS["pyramid"].make(problem, dtype, device=device)[:3]


def check_statistics(problem: Problem, dtype: torch.dtype, tf32: bool, device: str) -> None:
    """The result has the bits it has without statistics, which are its own."""
    made = arguments(problem, dtype, device)
    y, mean, squares = operator()(*made, tf32)
    plain = FAMILY.op("atrous_pyramid")(*made, None, None, False, tf32)
    assert torch.equal(y, plain)
    assert y.stride() == plain.stride()
    assert_statistics(y, mean, squares)
    again = operator()(*made, tf32)
    assert all(map(torch.equal, again, (y, mean, squares)))


def check_large_mean(dtype: torch.dtype, device: str) -> None:
    """Sums of squares less the square of the sum would have no digit left."""
    x, weights, rates = arguments(PROBLEMS["aspp"], dtype, device)
    x[:, 0] = 64.0
    for w in weights:
        w.mul_(2**-6)
        w[:, 0] = 0.0
        w[:, 0, w.shape[2] // 2, w.shape[3] // 2] = 1.0
    assert_statistics(*operator()(x, weights, rates))


def check_operator(name: str, dtype: torch.dtype, device: str, grad: bool = False) -> None:
    x, weights, rates = arguments(PROBLEMS[name], dtype, device)
    if grad:
        x, *weights = (t.detach().requires_grad_() for t in (x, *weights))
    opcheck(operator().default, (x, weights, rates))


def check_derivatives(device: str) -> None:
    """Of y alone, to the second order and in forward mode; the statistics are constants."""
    x, weights, rates = arguments(PROBLEMS["kernel_1x3_3x1"], torch.float64, device)
    small = (x[:1, :3, :4, :5], *(w[:2, :3] for w in weights))
    leaves = [t.clone().requires_grad_() for t in small]

    def result(x: Tensor, *weights: Tensor) -> Tensor:
        return operator()(x, list(weights), rates)[0]

    assert gradcheck(result, leaves, check_forward_ad=True)
    assert gradgradcheck(result, leaves)
    y, *statistics = operator()(leaves[0], leaves[1:], rates)
    assert y.requires_grad
    assert not any(t.requires_grad for t in statistics)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(leaves[0].detach(), torch.ones_like(leaves[0]))
        y, *statistics = operator()(x, [t.detach() for t in leaves[1:]], rates)
        assert forward_ad.unpack_dual(y).tangent is not None
        assert all(forward_ad.unpack_dual(t).tangent is None for t in statistics)


def check_autocast(device: str) -> None:
    x, weights, rates = arguments(PROBLEMS["aspp"], torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        y, mean, squares = operator()(x, weights, rates)
    expected = operator()(x.bfloat16(), [w.bfloat16() for w in weights], rates)
    assert y.dtype == torch.bfloat16
    assert all(map(torch.equal, (y, mean, squares), expected))


def check_batching(device: str) -> None:
    """Each sample of a vmap has statistics of its own."""
    x, weights, rates = arguments(PROBLEMS["aspp"], torch.float32, device)
    got = torch.func.vmap(lambda x: operator()(x, weights, rates))(x[:, None])
    for i in range(x.shape[0]):
        expected = operator()(x[i : i + 1], weights, rates)
        assert all(torch.equal(g[i], e) for g, e in zip(got, expected, strict=True))


def check_refusals(device: str) -> None:
    """An empty batch; and what the pyramid itself refuses, in its words."""
    x, weights, rates = arguments(PROBLEMS["aspp"], torch.float32, device)
    empty = "atrous_pyramid: statistics need at least one sample, got a batch of 0"
    channels = "atrous_pyramid: weights[0] has 16 input channels but x has 15"
    for at in (device, "meta"):
        moved = [w.to(at) for w in weights]
        for bad, sentence in ((x[:0], empty), (x[:, 1:], channels)):
            for grad in (False, True):
                with pytest.raises((RuntimeError, ValueError)) as refusal:
                    operator()(bad.to(at).detach().requires_grad_(grad), moved, rates)
                assert str(refusal.value).partition("\n")[0] == sentence


def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What the training steps are given from now on."""
    seen: list[tuple] = []

    def spy(*arguments, **keywords):
        seen.append(atrous_pyramid_statistics(*arguments, **keywords))
        return seen[-1]

    monkeypatch.setattr(layers, "atrous_pyramid_statistics", spy)
    return seen
