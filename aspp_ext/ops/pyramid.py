# SPDX-License-Identifier: BSD-3-Clause
"""``atrous_pyramid``: all dense atrous branches as one operator, closed under differentiation.

Forward, gradient of the input and gradient of the weights are the three faces of one trilinear
form ``T(x, w, g) = <g, conv(x, w)>``. Each face is linear in its two arguments, so its derivatives
are the other two faces, and gradients of every order stay inside the three operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._autograd_key import register
from ..dispatch import Problem, pairs, select
from . import checks
from .checks import Rate
from .family import FAMILIES, NATIVE, Family, family_of
from .formats import empty_image, in_strides_of, in_strides_of_image
from .polyphase_choice import BY_COST, policy
from .precision import allows_tf32
from .registration import (
    fold_image,
    register_autocast,
    register_fake,
    register_vmap,
    under_autocast,
)
from .sibling import define_sibling

_OP = "atrous_pyramid"


def atrous_pyramid(
    x: Tensor,
    weights: Sequence[Tensor],
    atrous_rates: Sequence[Rate],
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
    polyphase: bool = True,
) -> Tensor:
    """All atrous convolutions of a pyramid, concatenated over channels.

    ``y = activation((cat_b conv(x, weights[b], rate_b) + bias) * scale + shift)`` with stride 1 and
    zero padding ``rate * (k - 1) / 2`` (DeepLab v3, arXiv 1706.05587, section 3.3). Taps that fall
    outside the map are never multiplied. On CUDA float32 products are in TF32 where PyTorch's
    switches allow it for convolutions.

    Args:
        x: ``[N, C, H, W]``, or ``[N, C, L]`` for one dimension; any memory format.
        weights: per branch ``[O_b, C, kh_b, kw_b]`` (``[O_b, C, k_b]`` in one dimension) with odd
            kernel sizes.
        atrous_rates: per branch an int or ``(rate_h, rate_w)``, at least 1.
        bias, scale: ``[sum O]``.
        shift: ``[sum O]``, or ``[N, sum O]``: one per sample.
        activation: None or ``"relu"``.
        backend: force an implementation (see :func:`aspp_ext.explain`); None takes the first that
            can.
        polyphase: the CPU may compute 3-tap axes by minimal filtering, which multiplies less and
            rounds a little more; the gradients, too.

    Returns:
        ``[N, sum O, H, W]`` (``[N, sum O, L]``), channels_last if x or a weight is.

    Raises:
        ValueError: shapes, kernel sizes, rates or list lengths that do not fit, or an unknown
            backend.
        TypeError: an argument that is no tensor, or of another dtype than x, or no bool.
    """
    checks.check_tensor(_OP, "x", x)
    checks.check_list(_OP, "weights", weights)
    for b, w in enumerate(weights):
        checks.check_tensor(_OP, f"weights[{b}]", w)
    rates = checks.flat_rates(_OP, atrous_rates)
    line = x.dim() == 3
    x, weights = checks.as_rows(_OP, x, weights)
    x, weights, bias, scale, shift = under_autocast(x, list(weights), bias, scale, shift)
    channels = checks.check_dense(_OP, x, weights, rates)
    checks.check_vector(_OP, "bias", bias, x, channels)
    checks.check_vector(_OP, "scale", scale, x, channels)
    checks.check_vector(_OP, "shift", shift, x, channels, per_sample=True)
    checks.check_activation(_OP, "activation", activation)
    checks.check_flag(_OP, "polyphase", polyphase)
    implementation = select(Problem(_OP, x, tuple(weights)), backend)
    if bias is not None:
        moved = bias if scale is None else bias * scale
        shift = moved if shift is None else shift + moved
    relu = activation == "relu"
    way = (allows_tf32(x), policy(polyphase))
    y = implementation.call(x, weights, rates, scale, shift, relu, *way)
    return y.squeeze(2) if line else y


def epilogue(y: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool) -> Tensor:
    """What the kernels fuse behind the convolutions, in differentiable operators."""
    if scale is not None:
        y = y * scale[:, None, None]
    if shift is not None:
        y = y + shift[..., None, None]
    return torch.relu(y) if relu else y


def zeros_for(values: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(t) if v is None else v for v, t in zip(values, like, strict=True)]


def add(*terms: Any) -> Any:
    """The sum of those that are there; None when none is."""
    present = [t for t in terms if t is not None]
    return None if not present else sum(present[1:], start=present[0])


def _sizes(weights: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    kernels = [int(s) for w in weights for s in w.shape[2:]]
    return kernels, [int(w.shape[0]) for w in weights]


# The three faces, in the family, at the rates and with the settings of a recorded call.
def _forward(ctx: Any, x: Tensor, weights: list[Tensor]) -> Tensor:
    op = family_of(ctx).op("atrous_pyramid")
    return op(x, weights, ctx.rates, None, None, False, ctx.tf32, ctx.polyphase)


def _grad_input(ctx: Any, grad: Tensor, weights: list[Tensor]) -> Tensor:
    op = family_of(ctx).op("atrous_pyramid_grad_input")
    return op(grad, weights, ctx.rates, ctx.tf32, ctx.polyphase)


def _grad_weight(ctx: Any, grad: Tensor, x: Tensor, kernels: list[int], outs: list[int]) -> Any:
    op = family_of(ctx).op("atrous_pyramid_grad_weight")
    return op(grad, x, kernels, outs, ctx.rates, ctx.tf32, ctx.polyphase)


def _grad_weights(ctx: Any, grad: Tensor, x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    grads = _grad_weight(ctx, grad, x, *_sizes(weights))
    return [in_strides_of(w, g) for w, g in zip(weights, grads, strict=True)]


class AtrousPyramid(torch.autograd.Function):
    """``apply(rates, tf32, polyphase, x, *weights)``, ``rates`` flat: (rate_h, rate_w) per branch.

    ``tf32`` allows float32 products to be rounded to TF32 on CUDA, ``polyphase`` is
    :func:`aspp_ext.ops.polyphase_choice.policy`'s; both are the gradients', too.
    """

    @staticmethod
    def pack(
        x: Tensor,
        weights: Sequence[Tensor],
        rates: list[int],
        scale: None = None,
        shift: None = None,
        relu: bool = False,
        tf32: bool = False,
        polyphase: int = BY_COST,
    ) -> tuple[Any, ...]:
        return (rates, tf32, polyphase, x, *weights)

    @staticmethod
    def call(
        op: Any, rates: list[int], tf32: bool, polyphase: int, x: Tensor, *weights: Tensor
    ) -> Tensor:
        return op(x, list(weights), rates, None, None, False, tf32, polyphase)

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return AtrousPyramid.call(NATIVE.op("atrous_pyramid"), *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.rates, ctx.tf32, ctx.polyphase, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        of_x, *of_weights = ctx.needs_input_grad[-len(weights) - 1 :]
        grad_x = in_strides_of_image(x, _grad_input(ctx, grad, weights)) if of_x else None
        grads: Sequence[Any] = [None] * len(weights)
        if any(of_weights):
            grads = _grad_weights(ctx, grad, x, weights)
        return (None, None, None, grad_x, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        t_x, *t_weights = tangents[3:]
        x, *weights = ctx.saved_tensors
        by_x = None if t_x is None else _forward(ctx, t_x, weights)
        by_w = None
        if any(t is not None for t in t_weights):
            by_w = _forward(ctx, x, zeros_for(t_weights, weights))
        return add(by_x, by_w)


class AtrousPyramidGradInput(torch.autograd.Function):
    """``apply(rates, tf32, polyphase, grad, *weights)``: derivative of T by x."""

    @staticmethod
    def pack(
        grad: Tensor,
        weights: Sequence[Tensor],
        rates: list[int],
        tf32: bool = False,
        polyphase: int = BY_COST,
    ) -> tuple[Any, ...]:
        return (rates, tf32, polyphase, grad, *weights)

    @staticmethod
    def call(
        op: Any, rates: list[int], tf32: bool, polyphase: int, grad: Tensor, *weights: Tensor
    ) -> Tensor:
        return op(grad, list(weights), rates, tf32, polyphase)

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return AtrousPyramidGradInput.call(NATIVE.op("atrous_pyramid_grad_input"), *inputs)

    setup_context = staticmethod(AtrousPyramid.setup_context)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        grad, *weights = ctx.saved_tensors
        by_weights = _grad_weights(ctx, grad, v, weights)
        return (None, None, None, _forward(ctx, v, weights), *by_weights)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        t_grad, *t_weights = tangents[3:]
        grad, *weights = ctx.saved_tensors
        by_grad = None if t_grad is None else _grad_input(ctx, t_grad, weights)
        by_w = None
        if any(t is not None for t in t_weights):
            by_w = _grad_input(ctx, grad, zeros_for(t_weights, weights))
        return add(by_grad, by_w)


class AtrousPyramidGradWeight(torch.autograd.Function):
    """``apply(rates, tf32, polyphase, kernels, out_channels, grad, x)``: derivatives of T by the
    weights."""

    @staticmethod
    def pack(
        grad: Tensor,
        x: Tensor,
        kernels: list[int],
        out_channels: list[int],
        rates: list[int],
        tf32: bool = False,
        polyphase: int = BY_COST,
    ) -> tuple[Any, ...]:
        return (rates, tf32, polyphase, kernels, out_channels, grad, x)

    @staticmethod
    def call(
        op: Any, rates: Any, tf32: bool, polyphase: int, kernels: Any, outs: Any, *tensors: Tensor
    ) -> Any:
        return tuple(op(*tensors, kernels, outs, rates, tf32, polyphase))

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return AtrousPyramidGradWeight.call(NATIVE.op("atrous_pyramid_grad_weight"), *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.rates, ctx.tf32, ctx.polyphase, ctx.kernels, ctx.outs, grad, x = inputs
        ctx.save_for_backward(grad, x)
        ctx.save_for_forward(grad, x)

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> Any:
        grad, x = ctx.saved_tensors
        weights = list(v)
        return (*[None] * 5, _forward(ctx, x, weights), _grad_input(ctx, grad, weights))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        t_grad, t_x = tangents[5:]
        grad, x = ctx.saved_tensors
        sizes = (ctx.kernels, ctx.outs)
        parts = [None if t_grad is None else _grad_weight(ctx, t_grad, x, *sizes)]
        parts.append(None if t_x is None else _grad_weight(ctx, grad, t_x, *sizes))
        present = [p for p in parts if p is not None]
        return tuple(add(*ws) for ws in zip(*present, strict=True))


def _with_epilogue(
    family: Family,
    x: Tensor,
    weights: Sequence[Tensor],
    rates: list[int],
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
    tf32: bool = False,
    polyphase: int = BY_COST,
) -> Tensor | None:
    """With gradients, the epilogue is PyTorch's, so that its gradient is too."""
    if scale is None and shift is None and not relu:
        return None
    y = family.op("atrous_pyramid")(x, weights, rates, None, None, False, tf32, polyphase)
    return epilogue(y, scale, shift, relu)


def _check(x, weights, rates, scale=None, shift=None, relu=False, tf32=False, polyphase=BY_COST):
    channels = checks.check_dense(_OP, x, weights, rates)
    checks.check_vector(_OP, "scale", scale, x, channels)
    checks.check_vector(_OP, "shift", shift, x, channels, per_sample=True)
    checks.check_polyphase(_OP, polyphase)
    return channels


def _check_grad_input(grad, weights, rates, tf32=False, polyphase=BY_COST):
    op = "atrous_pyramid_grad_input"
    checks.check_image(op, "grad", grad)
    checks.check_rates(_OP, rates, len(weights))
    checks.check_kernel(_OP, "weights[0]", weights[0])
    x = grad.new_empty((1,)).expand((grad.size(0), weights[0].size(1), *grad.shape[2:]))
    checks.check_grad(_OP, grad, x, checks.check_dense(_OP, x, weights, rates))
    checks.check_polyphase(_OP, polyphase)
    return x.size(1)


def _check_grad_weight(grad, x, kernels, out_channels, rates, tf32=False, polyphase=BY_COST):
    op = "atrous_pyramid_grad_weight"
    checks.check_image(op, "x", x)
    checks.check_sizes(op, kernels, out_channels)
    checks.check_rates(_OP, rates, len(out_channels))
    for b, (kh, kw) in enumerate(pairs(kernels)):
        checks.check_odd(_OP, f"weights[{b}]", kh, kw)
    checks.check_grad(_OP, grad, x, sum(out_channels))
    checks.check_polyphase(_OP, polyphase)
    return [
        (o, x.size(1), kh, kw) for o, (kh, kw) in zip(out_channels, pairs(kernels), strict=True)
    ]


def _fake(x, weights, *rest):
    return empty_image(x, _check(x, weights, *rest), [x, *weights])


def _fake_grad_input(grad, weights, *rest):
    return empty_image(grad, _check_grad_input(grad, weights, *rest), [grad, *weights])


def _fake_grad_weight(grad, x, *rest):
    return [x.new_empty(size) for size in _check_grad_weight(grad, x, *rest)]


def _register(family: Family) -> None:
    forward, grad_input, grad_weight = (
        family.op(f"atrous_pyramid{face}").default for face in ("", "_grad_input", "_grad_weight")
    )
    register_fake(forward, _fake)
    register_fake(grad_input, _fake_grad_input)
    register_fake(grad_weight, _fake_grad_weight)
    register(
        *(forward, AtrousPyramid, family),
        check=_check,
        before=lambda *arguments: _with_epilogue(family, *arguments),
    )
    register(grad_input, AtrousPyramidGradInput, family, check=_check_grad_input)
    register(
        *(grad_weight, AtrousPyramidGradWeight, family),
        check=_check_grad_weight,
        unpack=lambda outputs, *_: list(outputs),
    )
    register_autocast(forward)
    register_vmap(forward, fold_image(forward))
    register_vmap(grad_input, fold_image(grad_input))
    register_vmap(grad_weight)


if _native.cpu_missing is None:
    define_sibling("atrous_pyramid", _check)
    define_sibling("atrous_pyramid_grad_input", _check_grad_input)
    define_sibling("atrous_pyramid_grad_weight", _check_grad_weight)
    for _family in FAMILIES:
        _register(_family)
