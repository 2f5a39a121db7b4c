# SPDX-License-Identifier: BSD-3-Clause
"""Autocast: the dtype the user chose, as PyTorch's convolution does it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from marks import on_all, on_native, proven_interpreted, quick_interpreted, varied
from table import BACKENDS, FAMILY
from torch._subclasses.fake_tensor import FakeTensorMode

import aspp_ext

pytestmark = [on_all, proven_interpreted, varied]

LOW = [torch.bfloat16, torch.float16]
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
each_low = pytest.mark.parametrize("low", LOW, ids=["bfloat16", "float16"])


def calls(x, backend):
    """name -> result of each public function, its weights in x's dtype."""
    to = {"dtype": x.dtype, "device": x.device}
    w, d = torch.ones(4, 3, 3, 3, **to), torch.ones(3, 1, 3, 3, **to)
    p, v, q = torch.ones(4, 3, 1, 1, **to), torch.ones(4, **to), torch.ones(2, 4, **to)
    head = (x, [None], [w], [2], v, None, None, q, torch.ones(2, **to))
    return {
        "pyramid": aspp_ext.atrous_pyramid(x, [w], [2], shift=v, backend=backend),
        "separable": aspp_ext.atrous_separable_conv2d(x, d, p, 2, bias=v, backend=backend),
        "head": aspp_ext.aspp_inference(*head, backend=backend),
        "branches": aspp_ext.aspp_inference(*head[:7], None, None, backend=backend),
    }


@quick_interpreted()
@each_backend
@each_low
def test_result_has_the_autocast_dtype(low, backend) -> None:
    x = torch.randn(1, 3, 5, 6)
    with torch.autocast("cpu", low):
        got = calls(x, backend)
    expected = calls(x.to(low), backend)
    for name, y in got.items():
        assert y.dtype == low, name
        assert torch.equal(y, expected[name]), name


@on_native
@each_backend
def test_float64_is_left_alone(backend) -> None:
    x = torch.randn(1, 3, 5, 6, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(y.dtype == torch.float64 for y in calls(x, backend).values())


@quick_interpreted()
@each_backend
@each_low
def test_mixed_dtypes_as_in_a_model(low, backend) -> None:
    """Features come in the low precision from the layer before, weights are float32."""
    x, w = torch.randn(1, 3, 5, 6), torch.randn(4, 3, 3, 3)
    d, p = torch.randn(3, 1, 3, 3), torch.randn(4, 3, 1, 1)
    with torch.autocast("cpu", low):
        y = aspp_ext.atrous_pyramid(x.to(low), [w], [2], backend=backend)
        z = aspp_ext.atrous_separable_conv2d(x.to(low), d, p, 2, backend=backend)
        assert y.dtype == z.dtype == F.conv2d(x.to(low), w).dtype == low
    expected = aspp_ext.atrous_pyramid(x.to(low), [w.to(low)], [2], backend=backend)
    assert torch.equal(y, expected)


@quick_interpreted()
@each_backend
def test_disabled_inside(backend) -> None:
    x = torch.randn(1, 3, 5, 6)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert all(y.dtype == torch.float32 for y in calls(x, backend).values())


@quick_interpreted()
@pytest.mark.parametrize("separable", [False, True])
def test_gradients_are_those_of_the_cast(separable) -> None:
    x, p = torch.randn(1, 3, 5, 6, requires_grad=True), torch.randn(4, 3, 1, 1, requires_grad=True)
    d = torch.randn(3, 1, 3, 3, requires_grad=True)
    leaves = [x, d, p] if separable else [x, p]

    def call(*t):
        if separable:
            return aspp_ext.atrous_separable_conv2d(*t, 2)
        return aspp_ext.atrous_pyramid(t[0], [t[1]], [2])

    with torch.autocast("cpu", torch.bfloat16):
        y = call(*leaves)
    got = torch.autograd.grad(y.float().square().sum(), leaves)
    y = call(*(t.bfloat16() for t in leaves))
    expected = torch.autograd.grad(y.float().square().sum(), leaves)
    assert all(g.dtype == torch.float32 for g in got)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


@quick_interpreted()
def test_direct_operator() -> None:
    x, w = torch.randn(1, 3, 5, 6), torch.randn(4, 3, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = FAMILY.op("atrous_pyramid")(x, [w.bfloat16()], [2, 2])
    assert y.dtype == torch.bfloat16


@on_native
@each_low
@pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning")
def test_cuda_autocast_without_a_gpu(low) -> None:
    """Fake tensors on "cuda": what a compiler on another machine sees."""
    with FakeTensorMode(), torch.autocast("cuda", low):
        torch.set_autocast_enabled("cuda", True)  # where there is no GPU it turned itself off
        try:
            x = torch.empty(2, 3, 5, 6, device="cuda")
            w = torch.empty(4, 3, 3, 3, device="cuda")
            y = torch.ops.aspp_ext.atrous_pyramid(x, [w], [2, 2])
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert (y.dtype, y.device.type, tuple(y.shape)) == (low, "cuda", (2, 4, 5, 6))
