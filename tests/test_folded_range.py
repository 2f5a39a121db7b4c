# SPDX-License-Identifier: BSD-3-Clause
"""Norms whose product with the weights a dtype cannot hold, though each of the two, and every
result on the way, it can."""

from __future__ import annotations

import copy

import pytest
import torch
from aspp_pairs import PAIRS, features
from marks import on_native
from torch import Tensor, nn

import aspp_ext

pytestmark = on_native


def blocks(aspp: nn.Module) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Norms with the convolution before each, the projection's last."""
    found, conv = [], None
    for module in aspp.modules():
        if isinstance(module, nn.Conv2d):
            conv = module
        elif isinstance(module, nn.BatchNorm2d):
            found.append((conv, module))
    return found


def scaled(aspp: nn.Module, weight: float, norm: float, projection: float) -> None:
    """The branches by ``weight`` and ``norm``, without shifts; no pooled one."""
    *branches, (project, last) = blocks(aspp)
    for conv, batch_norm in branches:
        conv.weight.data *= weight
        batch_norm.weight.data *= norm
        batch_norm.bias.data.zero_()
        batch_norm.running_mean.zero_()
    branches[-1][1].weight.data.zero_()
    project.weight.data *= projection
    last.bias.data.zero_()
    last.running_mean.zero_()


def errors(original: nn.Module, ours: nn.Module, x: Tensor) -> tuple[float, float]:
    """PyTorch's and ours, by the norm."""
    with torch.no_grad():
        truth = copy.deepcopy(original).double()(x.double())
        assert truth.isfinite().all()
        assert truth.any()
        found = [float((m(x) - truth).norm() / truth.norm()) for m in (original, ours)]
    return found[0], found[1]


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize(
    ("weight", "norm", "image", "projection"),
    [
        (1e20, 1e25, 1e-20, 1e-5),
        (1e-25, 1e-25, 1e25, 1e25),
        (1e-20, 1e-22, 1e15, 1e27),
        (1e30, 1e-30, 1e-10, 1e8),
    ],
    ids=["over", "under", "few digits", "within"],
)
@pytest.mark.parametrize("name", PAIRS)
def test_products_beyond_float32(name, weight, norm, image, projection, frozen) -> None:
    original, ours = (m.float().eval() for m in PAIRS[name].build())
    for module in (original, ours):
        scaled(module, weight, norm, projection)
    if frozen:
        aspp_ext.freeze(ours)
    for _ in range(2):
        plain, fused = errors(original, ours, features().float() * image)
        assert fused <= 2 * plain
    held = weight * norm == 1
    assert ours._aspp_ext_folded.in_range is held
    (entry,) = aspp_ext.fuse_report(ours)
    words = "torch.float32 cannot hold the products of its norms and weights"
    assert entry.reason == (None if held else words)


@pytest.mark.parametrize("name", PAIRS)
def test_a_largest_weight(name) -> None:
    """Which the norm would make infinite."""
    original, ours = (m.float().eval() for m in PAIRS[name].build())
    for module in (original, ours):
        conv, norm = blocks(module)[1]
        conv.weight.data[0, 0, 0, 0] = 3.4e38
        norm.weight.data[0] = 30.0
    plain, fused = errors(original, ours, features().float() * 1e-4)
    assert fused <= 2 * plain


@pytest.mark.parametrize("spread", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("name", PAIRS)
def test_float16_by_large_activations(name, spread) -> None:
    """Their norms divide so much that folded weights would be subnormal."""
    original, ours = (m.float().eval() for m in PAIRS[name].build())
    for module in (original, ours):
        for conv, norm in blocks(module)[:-1]:
            conv.weight.data *= 0.02
            norm.running_var *= spread**2
            norm.running_mean *= spread
    x = features(2, height=17, width=19).float() * spread
    with torch.autocast("cpu", torch.float16):
        plain, fused = errors(original, ours, x)
    assert fused <= 2 * plain


@pytest.mark.parametrize("name", PAIRS)
def test_float16_beside_rows_that_are_large_and_do_nothing(name) -> None:
    """A dead pooled branch, whose weights have all their digits."""
    original, ours = (m.float().eval() for m in PAIRS[name].build())
    for module in (original, ours):
        *branches, (_, dead) = blocks(module)[:-1]
        dead.bias.data.fill_(-1e3)
        for conv, norm in branches:
            conv.weight.data *= 0.02
            norm.running_var *= 1e8
            norm.running_mean *= 1e4
    x = features(2, height=17, width=19).float() * 1e4
    with torch.autocast("cpu", torch.float16):
        plain, fused = errors(original, ours, x)
    assert fused <= 2 * plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("left", [1e-2, 1e-3, 1e-4, 1e-6, 1e-12, 1e-38, 0.0])
@pytest.mark.parametrize("name", PAIRS)
def test_channels_that_died_are_folded(name, left, dtype) -> None:
    """Weight decay leaves channels that are next to nothing: they may lose digits."""
    ours = PAIRS[name].build()[1].float().eval().requires_grad_(False)
    for conv, norm in blocks(ours):
        norm.weight.data[0] *= left
        norm.bias.data[0] *= left
        conv.weight.data[1] *= left
        norm.running_var[1] *= left**2
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        ours(features().float())
    assert ours._aspp_ext_folded.in_range
