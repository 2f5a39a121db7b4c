# SPDX-License-Identifier: BSD-3-Clause
"""Batch norms of channels_last maps, whose sums over all pixels are cut where one chain would lose
digits: as near to the truth as PyTorch's of contiguous maps."""

from __future__ import annotations

import copy

import pytest
import torch
from aspp_pairs import PAIRS, features
from marks import on_cpu
from torch import Tensor, nn

from aspp_ext.modules.joint_norm import one_norm

pytestmark = [on_cpu, pytest.mark.settings("isa")]
MAPS = {
    "random": lambda y: y,
    "a constant sample": lambda y: y[-1].fill_(0.3),
    "a constant half": lambda y: y[..., y.size(3) // 2 :].fill_(-0.7),
    "a huge column": lambda y: y[0, ..., 3].mul_(1e6),
    "far from zero": lambda y: y.add_(10),
    "huge": lambda y: y.mul_(1e16),
}


def results(of, y: Tensor, grad: Tensor, training: bool, dtype: torch.dtype, last: bool) -> list:
    kept = torch.channels_last if last else torch.contiguous_format
    norm = nn.BatchNorm2d(y.size(1)).to(dtype).train(training)
    given = y.to(dtype).clone(memory_format=kept).requires_grad_()
    found = of(norm, given)
    found.backward(grad.to(dtype).contiguous(memory_format=kept))
    sums = [norm.running_mean, norm.running_var] if training else []
    return [found.detach(), given.grad, norm.weight.grad, norm.bias.grad, *sums]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("case", MAPS)
@pytest.mark.parametrize("shape", [(2, 40, 65, 65), (3, 37, 1, 4096)], ids=str)
def test_norms(shape, case, training) -> None:
    """Of channels_last maps, beside PyTorch's of contiguous ones: its own of these lose digits."""
    y, grad = torch.randn(shape), torch.randn(shape) + 1
    MAPS[case](y)

    check(y, grad, training)


@pytest.mark.parametrize("mean", [0, 10, 1000])
@pytest.mark.parametrize("rest", [1, 0.01])
@pytest.mark.parametrize("shape", [(2, 40, 65, 65), (2, 16, 16, 16)], ids=str)
def test_gradients_along_the_map(shape, rest, mean) -> None:
    """Which the norm takes out but for a rest."""
    y = torch.randn(shape)
    check(y + mean, y + rest * torch.randn(shape), True)


def check(y: Tensor, grad: Tensor, training: bool) -> None:
    call = (y, grad, training)
    got = results(one_norm, *call, torch.float32, True)
    plain = results(lambda norm, t: norm(t), *call, torch.float32, False)
    exact = results(lambda norm, t: norm(t), *call, torch.float64, False)
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    for ours, theirs, truth in zip(got, plain, exact, strict=True):
        errors = [(t - truth).norm() / truth.norm() for t in (ours, theirs)]
        assert errors[0] <= 2 * errors[1] + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_second_derivatives(training) -> None:
    y = torch.randn(2, 5, 4, 3, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    found = []
    for of in (one_norm, lambda norm, t: norm(t)):
        norm = nn.BatchNorm2d(5).double().train(training)
        torch.manual_seed(1)
        norm.weight.data.uniform_(0.5, 1.5)
        norm.running_var.uniform_(0.5, 1.5)
        leaves = [y.clone().requires_grad_(), *norm.parameters()]
        out = of(norm, leaves[0])
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        total = sum(g.square().sum() for g in first)
        found.append([*first, *torch.autograd.grad(total, leaves)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_eps_of_zero_is_refused_as_by_pytorch() -> None:
    y = torch.randn(2, 5, 4, 3).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="eps must be positive during training"):
        one_norm(nn.BatchNorm2d(5, eps=0), y)


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("case", ["random", "a constant sample", "a constant half"])
@pytest.mark.parametrize("name", PAIRS)
def test_training(name, case, last) -> None:
    """Results and running statistics, beside contiguous maps in PyTorch."""
    original, ours = PAIRS[name].build()
    x = features(2, height=65, width=65)
    MAPS[case](x)
    original.project[3].p = ours.project[3].p = 0
    found = []
    for module, dtype in ((ours, torch.float32), (original, torch.float32), (original, x.dtype)):
        module = copy.deepcopy(module).to(dtype)
        kept = torch.channels_last if last and module is not original else torch.contiguous_format
        y = module(x.to(dtype).contiguous(memory_format=kept)).detach()
        found.append([y, *(b for b in module.buffers() if b.is_floating_point())])
    for got, plain, exact in zip(*found, strict=True):
        errors = [(t - exact).norm() / exact.norm() for t in (got, plain)]
        assert errors[0] <= 2 * errors[1] + torch.finfo(torch.float32).eps
