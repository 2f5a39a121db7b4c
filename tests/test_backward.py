# SPDX-License-Identifier: BSD-3-Clause
"""Gradients through the public functions: numerical checks, masks, strange gradients, precision."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from marks import (
    on_all,
    on_native,
    proven_emulated,
    proven_interpreted,
    quick_emulated,
    quick_interpreted,
    sanitized,
    varied,
)
from table import FAMILY, WIDEST
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import aspp_ext
from aspp_ext import reference
from aspp_ext.testing import assert_no_worse_than_torch, laid_out

pytestmark = [on_all, proven_interpreted, varied, sanitized]


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=WIDEST).requires_grad_()


def pyramid(rates, **keywords):
    def call(x, *weights):
        return aspp_ext.atrous_pyramid(x, list(weights), rates, **keywords)

    return call


def pyramid_epilogue(x, w0, w1, bias, scale, shift):
    keywords = {"bias": bias, "scale": scale, "shift": shift, "activation": "relu"}
    return aspp_ext.atrous_pyramid(x, [w0, w1], [1, (2, 3)], **keywords)


def separable(x, d0, p0, d1, p1, p2):
    return aspp_ext.atrous_separable_pyramid(x, [d0, d1, None], [p0, p1, p2], [1, (2, 3), 1])


def separable_epilogue(x, d, p, bias, scale, shift):
    keywords = {"bias": bias, "scale": scale, "shift": shift, "activation": "relu"}
    return aspp_ext.atrous_separable_conv2d(x, d, p, 2, **keywords)


def separable_between(x, d, p, q, scale, shift):
    between = [(scale, shift), None]
    return aspp_ext.atrous_separable_pyramid(x, [d, None], [p, q], [2, 1], between=between)


def separable_between_relu(x, d, p, q, scale, shift):
    return aspp_ext.atrous_separable_pyramid(
        *(x, [d, None], [p, q], [2, 1]),
        between=[(scale, shift), None],
        between_activation="relu",
    )


X = (2, 3, 4, 5)
FUNCTIONS = {
    "pyramid": (pyramid([1, (2, 3)]), [X, (2, 3, 1, 1), (2, 3, 3, 3)]),
    "pyramid_rates_above_the_map": (pyramid([9, (1, 7)]), [X, (2, 3, 3, 3), (1, 3, 5, 3)]),
    "pyramid_one_dimension": (pyramid([3]), [(2, 3, 7), (2, 3, 3)]),
    "pyramid_epilogue": (
        pyramid_epilogue,
        [X, (2, 3, 3, 3), (1, 3, 3, 1), (3,), (3,), (2, 3)],
    ),
    "separable": (separable, [X, (3, 1, 3, 3), (2, 3, 1, 1), (3, 1, 1, 3), *2 * [(2, 3, 1, 1)]]),
    "separable_epilogue": (
        separable_epilogue,
        [X, (3, 1, 3, 3), (2, 3, 1, 1), (2,), (2,), (2, 2)],
    ),
    "separable_between": (
        separable_between,
        [X, (3, 1, 3, 3), (2, 3, 1, 1), (1, 3, 1, 1), (3,), (3,)],
    ),
    "separable_between_relu": (
        separable_between_relu,
        [X, (3, 1, 3, 3), (2, 3, 1, 1), (1, 3, 1, 1), (3,), (3,)],
    ),
}
LINEAR = [name for name in FUNCTIONS if name != "separable_between_relu"]


@quick_emulated(lambda name: name in ("pyramid", "separable"))
@on_native
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(name) -> None:
    function, shapes = FUNCTIONS[name]
    forward = name in LINEAR  # with an activation between, forward mode says that it cannot
    assert gradcheck(
        function,
        [leaf(*s) for s in shapes],
        check_undefined_grad=True,
        check_forward_ad=forward,
    )


@proven_emulated
@on_native
@pytest.mark.parametrize("name", LINEAR)
def test_gradgradcheck(name) -> None:
    function, shapes = FUNCTIONS[name]
    over = name.startswith("pyramid")  # the separable operator says that it cannot
    assert gradgradcheck(function, [leaf(*s) for s in shapes], check_fwd_over_rev=over)


class Calls(TorchDispatchMode):
    """Counts the operators of ours that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aspp_ext":
            self.count[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


def gradients(module, name, tensors, needed):
    tensors = [t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
    if name == "pyramid":
        y = module.atrous_pyramid(tensors[0], tensors[1:], [2, 1])
    else:
        x, d, p, q = tensors
        y = module.atrous_separable_pyramid(x, [d, None], [p, q], [2, 1])
    (y * torch.arange(y.numel()).view(y.shape)).sum().backward()
    return [t.grad for t in tensors]


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("pyramid", [X, (2, 3, 3, 3), (4, 3, 1, 1)]),
        ("separable", [X, (3, 1, 3, 3), (2, 3, 1, 1), (4, 3, 1, 1)]),
    ],
    ids=["pyramid", "separable"],
)
def test_only_what_requires_a_gradient_gets_one(name, shapes) -> None:
    tensors = [torch.randint(-3, 4, s).to(WIDEST) for s in shapes]
    for needed in itertools.product([False, True], repeat=len(shapes)):
        if not any(needed):
            continue
        with Calls() as calls:
            got = gradients(aspp_ext, name, tensors, needed)
        expected = gradients(reference, name, tensors, needed)
        for g, e in zip(got, expected, strict=True):
            assert (g is None) == (e is None)
            assert g is None or torch.equal(g, e)
        if name == "pyramid":
            assert calls.count[f"atrous_pyramid_grad_input{FAMILY.suffix}"] == needed[0]
            weight = f"atrous_pyramid_grad_weight{FAMILY.suffix}"
            assert calls.count[weight] == any(needed[1:])


@quick_interpreted()
def test_nothing_is_recorded_without_need() -> None:
    x, w = torch.randn(1, 3, 4, 5), torch.randn(2, 3, 3, 3)
    assert aspp_ext.atrous_pyramid(x, [w], [1]).grad_fn is None
    with torch.no_grad():
        assert aspp_ext.atrous_pyramid(x.requires_grad_(), [w], [1]).grad_fn is None
    with torch.inference_mode():
        assert aspp_ext.atrous_pyramid(x, [w], [1]).is_inference()


GRADS = ["expanded_batch", "expanded_channels", "expanded_plane", "channels_last", "sliced"]
GRADS += ["channel_slice", "row_slice", "column_slice"]


@quick_interpreted(lambda layout: layout == "sliced")
@pytest.mark.parametrize("layout", [*GRADS, "transposed"])
@pytest.mark.parametrize("name", ["pyramid", "separable", "separable_between_relu"])
def test_gradient_of_any_layout(name, layout) -> None:
    function, shapes = FUNCTIONS[name]
    tensors = [leaf(*s) for s in shapes]
    y = function(*tensors)
    grad = laid_out(torch.randn_like(y), layout)
    got = torch.autograd.grad(y, tensors, grad, retain_graph=True)
    expected = torch.autograd.grad(y, tensors, grad.contiguous())
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


@quick_interpreted()
def test_sum_backward() -> None:
    """``sum`` sends a gradient of stride 0 in every dimension."""
    x, w = leaf(2, 3, 4, 5), leaf(2, 3, 3, 3)
    aspp_ext.atrous_pyramid(x, [w], [2]).sum().backward()
    expected = torch.autograd.grad(reference.atrous_pyramid(x, [w], [2]).sum(), [x, w])
    torch.testing.assert_close([x.grad, w.grad], list(expected))


@quick_interpreted()
@pytest.mark.parametrize("name", ["pyramid", "separable"])
def test_gradients_have_their_tensors_memory_format(name) -> None:
    x = torch.randn(2, 16, 6, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(8, 16, 1, 1).requires_grad_()
    d = torch.randn(16, 1, 3, 3).requires_grad_()
    if name == "pyramid":
        y = aspp_ext.atrous_pyramid(x, [w], [1])
    else:
        y = aspp_ext.atrous_separable_conv2d(x, d, w, 2)
    y.square().sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    assert w.grad.stride() == w.stride()


@quick_interpreted()
def test_shared_tensor_gets_both_gradients() -> None:
    x, w = leaf(1, 3, 5, 4), leaf(2, 3, 3, 3)
    got = torch.autograd.grad(aspp_ext.atrous_pyramid(x, [w, w], [1, 2]).square().sum(), w)
    expected = torch.autograd.grad(reference.atrous_pyramid(x, [w, w], [1, 2]).square().sum(), w)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["pyramid_epilogue", "separable_epilogue"])
def test_low_precision_gradients(name, dtype) -> None:
    """The whole path, epilogue included, as a user trains with it."""
    bias = 0.1 * torch.randn(2, 12)
    shapes = {
        "pyramid_epilogue": [(2, 24, 12, 13), (7, 24, 1, 1), (5, 24, 3, 3)],
        "separable_epilogue": [(2, 24, 12, 13), (24, 1, 3, 3), (12, 24, 1, 1)],
    }[name]
    tensors = [torch.randn(s) / (s[1] * s[2]) ** 0.5 for s in shapes]
    grad = torch.randn(2, 12, 12, 13).to(dtype)

    def run(module, to):
        leaves = [t.to(dtype).to(to).requires_grad_() for t in tensors]
        shift = bias.to(dtype).to(to)
        if name == "pyramid_epilogue":
            y = module.atrous_pyramid(leaves[0], leaves[1:], [1, 3], shift=shift)
        else:
            y = module.atrous_separable_conv2d(*leaves, 3, shift=shift)
        return torch.autograd.grad(y, leaves, grad.to(to))

    runs = (run(aspp_ext, dtype), run(reference, dtype), run(reference, torch.float64))
    for got, baseline, oracle in zip(*runs, strict=True):
        assert_no_worse_than_torch(got, baseline, oracle, factor=3)


@on_native
@pytest.mark.parametrize("channels", [(37, 203), (43, 11), (24, 40), (48, 40)])
def test_weight_gradient_in_bfloat16_of_any_number_of_channels(channels) -> None:
    """PyTorch's, in channels_last, is wrong or crashes where they are no multiple of 16."""
    c, out = channels
    x = torch.randint(-2, 3, (1, c, 41, 41)).bfloat16()
    grad = torch.randint(-2, 3, (1, out, 41, 41)).bfloat16()
    for layout in (torch.contiguous_format, torch.channels_last):
        last = [t.contiguous(memory_format=layout) for t in (grad, x)]
        (got,) = FAMILY.op("atrous_pyramid_grad_weight")(*last, [3, 3], [out], [5, 5])
        weight = torch.zeros(out, c, 3, 3, dtype=torch.float64).requires_grad_()
        y = reference.atrous_pyramid(x.double(), [weight], [5])
        (expected,) = torch.autograd.grad(y, weight, grad.double())
        assert torch.equal(got, expected.bfloat16())
