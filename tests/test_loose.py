# SPDX-License-Identifier: BSD-3-Clause
"""Minimal filtering where pixels or taps are unlike each other: what it would round too much is
computed directly, so that no output errs by what it does not read."""

from __future__ import annotations

import copy

import pytest
import torch
from aspp_pairs import smp, torchvision
from marks import sanitized
from minimal_bound import Axis, axes_of, choice_of, filtered, problem_of
from pixel_law import CASES, summed, why_pixels_are_worse
from torch import Tensor

import aspp_ext
from aspp_ext import _plan, reference

pytestmark = [sanitized, pytest.mark.settings("isa", "threads")]

SHAPES = {
    "pairs": ((2, 64, 12, 13), 24, 7),
    "triples": ((2, 72, 9, 9), 40, 3),
    "overlapped": ((2, 64, 17, 14), 70, 3),
    "singles": ((2, 64, 7, 9), 24, 6),
}
each_case = pytest.mark.parametrize("case", CASES)
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_format = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)


@pytest.fixture(autouse=True)
def always(monkeypatch) -> None:
    monkeypatch.setenv("ASPP_EXT_POLYPHASE", "always")


def operands(shape: str, case: str) -> tuple[Tensor, Tensor, int]:
    size, out_channels, rate = SHAPES[shape]
    x, weight = torch.randn(size), torch.randn(out_channels, size[1], 3, 3)
    CASES[case](x, weight)
    return x, weight, rate


@each_format
@each_case
@each_shape
def test_outputs(shape, case, memory_format) -> None:
    x, weight, rate = operands(shape, case)
    exact = reference.atrous_pyramid(x.double(), [weight.double()], [rate])
    expected = reference.atrous_pyramid(x, [weight], [rate])
    got = aspp_ext.atrous_pyramid(x.to(memory_format=memory_format), [weight], [rate])
    scale = summed(x, weight, rate)
    why = why_pixels_are_worse(got, expected, exact, scale)
    assert why is None, why


@each_case
@each_shape
def test_outputs_in_float64(shape, case) -> None:
    """Beside the direct computation, whose errors are of the size of what is allowed."""
    x, weight, rate = (t.double() if isinstance(t, Tensor) else t for t in operands(shape, case))
    got, direct = (
        aspp_ext.atrous_pyramid(x, [weight], [rate], polyphase=on) for on in (True, False)
    )
    scale = summed(x, weight, rate)
    error = (got - direct).norm(dim=1)
    assert torch.equal(got.isfinite(), direct.isfinite())
    assert (error[scale == 0] == 0).all()
    seen = (scale > 0) & scale.isfinite()
    assert (error[seen] / scale[seen]).max() < 100 * torch.finfo(torch.float64).eps


@each_case
@each_shape
def test_the_gradient_of_the_input(shape, case) -> None:
    """In which the gradient of the output plays the part of x: masked pixels have none."""
    size, out_channels, rate = SHAPES[shape]
    grad, weight = torch.randn(2, out_channels, *size[2:]), torch.randn(out_channels, size[1], 3, 3)
    CASES[case](grad, weight)

    def gradient(atrous_pyramid, dtype: torch.dtype, rates: list[int]) -> Tensor:
        x = torch.zeros(size, dtype=dtype, requires_grad=True)
        y = atrous_pyramid(x, [weight.to(dtype)] * len(rates), rates)
        (got,) = torch.autograd.grad(y, x, torch.cat([grad.to(dtype)] * len(rates), 1))
        return got

    mirrored = weight.transpose(0, 1).flip(2, 3)
    for rates in ([rate], [rate, rate + 1]):
        exact = gradient(reference.atrous_pyramid, torch.float64, rates)
        expected = gradient(reference.atrous_pyramid, torch.float32, rates)
        got = gradient(aspp_ext.atrous_pyramid, torch.float32, rates)
        scale = torch.stack([summed(grad, mirrored, r) for r in rates]).square().sum(0).sqrt()
        why = why_pixels_are_worse(got, expected, exact, scale)
        assert why is None, why


OF_PIXELS = [case for case in CASES if "taps" not in case and case != "both"]


@pytest.mark.parametrize("side", ["x", "grad", "apart"])
@pytest.mark.parametrize("case", OF_PIXELS)
@each_shape
def test_the_gradient_of_the_weight(shape, case, side) -> None:
    """Tap by tap; ``apart``: where they never meet in the same half."""
    size, out_channels, rate = SHAPES[shape]
    x, grad = torch.randn(size), torch.randn(2, out_channels, *size[2:])
    none = torch.zeros(1, 1, 3, 3)
    if side != "grad":
        CASES[case](x, none)
    if side == "grad":
        CASES[case](grad, none)
    if side == "apart":
        grad[..., size[3] // 2 :] = 0

    def gradient(atrous_pyramid, dtype: torch.dtype) -> Tensor:
        w = torch.zeros(out_channels, size[1], 3, 3, dtype=dtype, requires_grad=True)
        y = atrous_pyramid(x.to(dtype), [w], [rate])
        (got,) = torch.autograd.grad(y, w, grad.to(dtype))
        return got

    def taps(a: Tensor) -> Tensor:
        return a.flatten(0, 1).flatten(1).T  # [taps, O * C]

    one = torch.ones(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    energies = [t.double().square().sum(1, keepdim=True) for t in (x, grad)]
    y = reference.atrous_pyramid(energies[0], [one], [rate])
    (scale,) = torch.autograd.grad(y, one, energies[1])
    got, expected, exact = (
        taps(gradient(f, dtype))
        for f, dtype in (
            (aspp_ext.atrous_pyramid, torch.float32),
            (reference.atrous_pyramid, torch.float32),
            (reference.atrous_pyramid, torch.float64),
        )
    )
    why = why_pixels_are_worse(got, expected, exact, scale.flatten().sqrt())
    assert why is None, why


def weight_gradients(x: Tensor, grad: Tensor, rate: int) -> list[Tensor]:
    """Ours, PyTorch's and the exact one."""
    found = []
    for f, dtype in (
        (aspp_ext.atrous_pyramid, x.dtype),
        (reference.atrous_pyramid, x.dtype),
        (reference.atrous_pyramid, torch.float64),
    ):
        w = torch.zeros(grad.size(1), x.size(1), 3, 3, dtype=dtype, requires_grad=True)
        found += torch.autograd.grad(f(x.to(dtype), [w], [rate]), w, grad.to(dtype))
    return found


@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("side", ["x", "grad"])
def test_zeros_of_single_channels(shape, side, dtype) -> None:
    """Of the gradient of a weight: a channel that only taps beyond the map would read."""
    size, out_channels, rate = SHAPES[shape]
    x, grad = torch.randn(size, dtype=dtype), torch.randn(2, out_channels, *size[2:], dtype=dtype)
    one = x if side == "x" else grad
    one[:, 3, 1:] = 0
    one[:, 5, :, :-1] = 0
    one[0, 7] = 0
    one[:, 11] = 0
    got, expected, exact = weight_gradients(x, grad, rate)
    assert (exact == 0).any()
    assert ((got == 0) == (exact == 0)).all()
    # Each element of these channels is few products.
    allowed = 20 * torch.finfo(dtype).eps * exact.abs().max()
    assert (got - exact).abs().max() <= max((expected - exact).abs().max() * 4, allowed)


@each_shape
def test_no_double_is_too_small(shape) -> None:
    """Whose square is 0."""
    size, out_channels, rate = SHAPES[shape]
    x, grad = torch.randn(size).double() * 1e-165, torch.randn(2, out_channels, *size[2:]).double()
    got, _, exact = weight_gradients(x, grad, rate)
    assert (got - exact).norm() <= 1e-13 * exact.norm()
    y, wanted = (
        f.atrous_pyramid(x, [grad[:1, :, :3, :3].repeat(size[1], 1, 1, 1).transpose(0, 1)], [rate])
        for f in (aspp_ext, reference)
    )
    assert (y - wanted).norm() <= 1e-13 * wanted.norm()


@each_shape
def test_channels_that_are_zero_where_pixels_are_huge(shape) -> None:
    """As ReLU leaves them: their gradients are made of small pixels alone."""
    size, out_channels, rate = SHAPES[shape]
    x, grad = torch.randn(size), torch.randn(2, out_channels, *size[2:])
    half = size[3] // 2
    x[..., half:] *= 1e6
    grad[:, 3, :, max(half - rate, 0) :] = 0
    got, expected, exact = weight_gradients(x, grad, rate)
    errors = [(g - exact)[3].abs().max() for g in (got, expected)]
    assert errors[0] <= 3 * errors[1] + 1e-5


# --- Heads and modules


@each_case
@each_shape
def test_a_head(shape, case) -> None:
    """Whose one branch passes through the projection as it is."""
    x, weight, rate = operands(shape, case)
    out_channels = len(weight)
    none, eye = torch.zeros(out_channels), torch.eye(out_channels)

    def head(aspp_inference, dtype: torch.dtype) -> Tensor:
        rest = (t.to(dtype) for t in (none, eye, none))
        shift, project, bias = rest
        return aspp_inference(
            x.to(dtype), [None], [weight.to(dtype)], [rate], shift, None, None, project, bias
        )

    got = head(aspp_ext.aspp_inference, torch.float32)
    expected, exact = (head(reference.aspp_inference, t) for t in (torch.float32, torch.float64))
    # Of infinite values the projection's zeros make NaN, of which ReLU makes what it likes.
    if expected.isfinite().all():
        why = why_pixels_are_worse(got, expected, exact, summed(x, weight, rate))
        assert why is None, why


ORIGINALS = {
    "torchvision": lambda: torchvision.ASPP(64, [3, 7], 48),
    "smp": lambda: smp.ASPP(64, 48, [3, 5, 7], False, 0.5),
}


@pytest.mark.parametrize("case", ["a half scaled down", "a half of zeros", "a padded sample"])
@each_format
@pytest.mark.parametrize("original", ORIGINALS)
def test_modules(original, memory_format, case) -> None:
    """Without what would hide a pixel's error: a pooled branch that is not zero."""
    plain = ORIGINALS[original]().eval()
    plain.convs[-1][1].weight.data.zero_()
    fused = aspp_ext.fuse(copy.deepcopy(plain))
    x = torch.randn(2, 64, 12, 13)
    CASES[case](x, torch.zeros(1, 1, 3, 3))
    with torch.no_grad():
        expected, exact = plain(x), copy.deepcopy(plain).double()(x.double())
        for _ in range(2):  # with matrices that are made, and kept
            got = fused(x.to(memory_format=memory_format))
            why = why_pixels_are_worse(got, expected, exact, exact.norm(dim=1))
            assert why is None, why


# --- What is computed directly


def test_only_what_is_loose_is_computed_directly() -> None:
    """A huge pixel of one sample: another sample's bits stay, and most of its own pixels'."""
    x, weight, rate = operands("triples", "one huge channel")
    (clean, got, direct) = (
        aspp_ext.atrous_pyramid(t, [weight], [rate], polyphase=on)
        for t, on in ((x.clamp(max=10), True), (x, True), (x, False))
    )
    assert torch.equal(got[0], clean[0])
    as_before = (got[1] == clean[1]).all(0)
    as_direct = (got[1] == direct[1]).all(0)
    small = x.clamp(max=10)
    reads = (summed(x, weight, rate) != summed(small, weight, rate))[1]
    assert (as_before | as_direct | reads).all()
    assert (as_direct & ~reads).any()
    assert (as_before & ~as_direct).sum() > 40


def noise(form, axes: tuple[tuple[int, int, int], ...], inputs: Tensor, taps: Tensor) -> Tensor:
    """That of minimal filtering as a multiple of the direct computation's."""
    minimal, direct = _plan.output_noise(
        *axes, form.rows, form.columns, inputs.flatten().tolist(), taps.flatten().tolist()
    )
    shape = inputs.shape
    return (
        (torch.tensor(minimal, dtype=torch.float64) / torch.tensor(direct, dtype=torch.float64))
        .sqrt()
        .reshape(shape)
    )


FRIENDLY = [(33, 6), (33, 12), (33, 18), (65, 12), (65, 24), (65, 36), (20, 3), (17, 2)]


@pytest.mark.parametrize(("size", "rate"), FRIENDLY)
@pytest.mark.parametrize("channels", [64, 2048])
def test_values_of_one_kind_have_no_loose_outputs(channels, size, rate) -> None:
    weight = torch.empty(64, channels, 3, 3, device="meta")
    form = choice_of(
        problem_of(weight.new_empty(1, channels, size, size), weight, (rate, rate))
    ).form
    axes = ((size, 3, rate),) * 2
    one = noise(form, axes, torch.ones(size, size), torch.ones(3, 3))
    assert 1 < one.max() < 2.1
    random = torch.randn(channels, size, size).square().sum(0).double()
    assert noise(form, axes, random, torch.ones(3, 3)).max() < 2.5


@each_case
@each_shape
def test_noise_is_that_of_the_tables(shape, case) -> None:
    """Beside dense sums over the form's matrices, with every coefficient squared."""
    x, weight, rate = operands(shape, case)
    x = x[:1].double()
    taps = weight.double().square().sum((0, 1))
    inputs = x.square().sum(1)[0]
    if not inputs.isfinite().all():
        return
    axes = axes_of(x.float(), weight, (rate, rate))
    squares = [Axis(a.taps**2, a.inputs**2, a.outputs**2, a.denominator) for a in axes]
    parts = squares[0].denominator * squares[1].denominator
    expected = filtered(inputs[None, None], taps[None, None], *squares)[0, 0] / parts**2
    form = choice_of(problem_of(x.float(), weight, (rate, rate))).form
    sizes = [(n, 3, rate) for n in inputs.shape]
    minimal, direct = _plan.output_noise(
        *sizes, form.rows, form.columns, inputs.flatten().tolist(), taps.flatten().tolist()
    )
    torch.testing.assert_close(
        torch.tensor(minimal, dtype=torch.float64).reshape(expected.shape), expected
    )
    scale = summed(x, weight, rate)[0]
    torch.testing.assert_close(
        torch.tensor(direct, dtype=torch.float64).reshape(scale.shape), scale**2
    )
