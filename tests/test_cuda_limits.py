# SPDX-License-Identifier: BSD-3-Clause
"""What the CUDA binding refuses although the operator could do it; emulated."""

from __future__ import annotations

import pytest
import torch
from marks import on_emulated

pytestmark = on_emulated
EDGE = 2**31 - 2**10
"""Kernels count in 32 bits, to the end of the last tile."""


def nothing(*sizes: int) -> torch.Tensor:
    """Of any size, without memory."""
    return torch.zeros(1).expand(sizes)


def refusals(x: torch.Tensor, weights: list[torch.Tensor], sentence: str) -> None:
    ops, rates = torch.ops.aspp_ext, [1, 1] * len(weights)
    grad = nothing(x.size(0), sum(w.size(0) for w in weights), *x.shape[2:])
    kernels = [side for w in weights for side in w.shape[2:]]
    for call in (
        lambda: ops.atrous_pyramid(x, weights, rates),
        lambda: ops.atrous_pyramid_grad_input(grad, weights, rates),
        lambda: ops.atrous_pyramid_grad_weight(
            grad, x, kernels, [w.size(0) for w in weights], rates
        ),
    ):
        with pytest.raises(RuntimeError) as error:
            call()
        assert sentence in str(error.value)


def test_branches() -> None:
    x, weight = torch.ones(1, 2, 1, 2), torch.ones(1, 2, 1, 1)
    refusals(x, [weight] * 65, "a pyramid must have at most 64 branches on CUDA, got 65")
    out = torch.ops.aspp_ext.atrous_pyramid(x, [weight] * 64, [1, 1] * 64)
    assert torch.equal(out, torch.full((1, 64, 1, 2), 2.0))


@pytest.mark.parametrize("shape", [(2**16, 1, 2**15, 1), (1, 1, 1, EDGE + 1)])
def test_pixels(shape) -> None:
    n, _, h, w = shape
    sentence = f"x must have at most {EDGE} pixels on CUDA, got {n} * {h} * {w}"
    refusals(nothing(*shape), [torch.ones(1, 1, 1, 1)], sentence)


def test_taps() -> None:
    sentence = "the branches must have at most 1048576 taps together but have 1050625"
    refusals(torch.ones(1, 1, 1, 1), [nothing(1, 1, 1025, 1025)], sentence)


@pytest.mark.parametrize("channels", [EDGE + 1, 2**31 - 2, 2**31])
def test_channels(channels) -> None:
    """The second fits in 32 bits until it is padded."""
    x, weight = nothing(1, channels, 1, 1), nothing(1, channels, 1, 1)
    with pytest.raises(RuntimeError, match=rf"channels.* must (be at most {EDGE}|fit in 32 bits)"):
        torch.ops.aspp_ext.atrous_pyramid(x, [weight], [1, 1])


def test_kernels_beyond_the_cpus_limit() -> None:
    x, weight = torch.ones(1, 1, 3, 40), torch.ones(1, 1, 1, 65)
    out = torch.ops.aspp_ext.atrous_pyramid(x, [weight], [1, 1])
    expected = torch.nn.functional.conv2d(x, weight, padding=(0, 32))
    assert torch.equal(out, expected)


def test_pixels_far_apart(monkeypatch) -> None:
    """Two pixels 2^31 bytes apart: more than the kernels' pitch can say, so they are copied."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    far = 2**30
    x = torch.empty(far + 8, dtype=torch.bfloat16).as_strided((1, 8, 1, 2), (2 * far, 1, far, far))
    x.copy_(torch.randint(-2, 3, x.shape))
    weight = torch.randint(-2, 3, (3, 8, 1, 3)).bfloat16()
    out = torch.ops.aspp_ext.atrous_pyramid(x, [weight], [1, 1])
    expected = torch.nn.functional.conv2d(x.double().contiguous(), weight.double(), padding=(0, 1))
    assert torch.equal(out, expected.bfloat16())
    (grad,) = torch.ops.aspp_ext.atrous_pyramid_grad_weight(out, x, [1, 3], [3], [1, 1])
    assert grad.isfinite().all()


def refused_separable(x: torch.Tensor, depthwise: torch.Tensor, count: int, sentence: str) -> None:
    ops, pointwise = torch.ops.aspp_ext, nothing(1, x.size(1), 1, 1)
    grad = nothing(x.size(0), count, *x.shape[2:])
    lists = ([depthwise] * count, [pointwise] * count, [1, 1] * count, [], [])
    for call in (
        lambda: ops.atrous_separable_pyramid(x, *lists),
        lambda: ops.atrous_separable_pyramid_backward(grad, x, *lists, False, *[True] * 4),
    ):
        with pytest.raises(RuntimeError) as error:
            call()
        assert sentence in str(error.value)


def test_separable_refusals() -> None:
    one, many = torch.ones(1, 2, 1, 2), nothing(2**16, 1, 2**15, 1)
    sentence = "a pyramid must have at most 64 branches on CUDA, got 65"
    refused_separable(one, torch.ones(2, 1, 3, 3), 65, sentence)
    sentence = f"x must have at most {EDGE} pixels on CUDA, got 65536 * 32768 * 1"
    refused_separable(many, torch.ones(1, 1, 1, 3), 1, sentence)
    channels = nothing(1, 2**31 - 2, 1, 1)
    sentence = f"the number of channels must be at most {EDGE} on CUDA, got 2147483648"
    refused_separable(channels, nothing(2**31 - 2, 1, 1, 1), 1, sentence)


def test_64_separable_branches() -> None:
    x, depthwise, pointwise = (
        torch.ones(1, 2, 1, 2),
        torch.ones(2, 1, 1, 3),
        torch.ones(1, 2, 1, 1),
    )
    lists = ([depthwise] * 64, [pointwise] * 64, [1, 1] * 64, [], [])
    out = torch.ops.aspp_ext.atrous_separable_pyramid(x, *lists)
    assert torch.equal(out, torch.full((1, 64, 1, 2), 4.0))
    grads = torch.ops.aspp_ext.atrous_separable_pyramid_backward(
        torch.ones_like(out), x, *lists, False, True, True, True, False
    )
    assert torch.equal(grads[0], torch.full_like(x, 128.0))


def test_separable_kernels_beyond_the_cpus_limit() -> None:
    """Most of the taps are outside the map."""
    x, depthwise = torch.ones(1, 1, 3, 40), torch.ones(1, 1, 1, 1025)
    lists = ([depthwise], [torch.ones(1, 1, 1, 1)], [1, 1], [], [])
    out = torch.ops.aspp_ext.atrous_separable_pyramid(x, *lists)
    assert torch.equal(out, torch.full_like(x, 40.0))
    grads = torch.ops.aspp_ext.atrous_separable_pyramid_backward(
        out, x, *lists, False, True, True, True, False
    )
    live = torch.arange(-512, 513).abs().clamp(max=40)
    assert torch.equal(grads[0], torch.full_like(x, 1600.0))
    assert torch.equal(grads[1][0].flatten(), 40.0 * 3 * (40.0 - live))
