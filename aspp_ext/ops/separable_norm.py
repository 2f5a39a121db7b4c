# SPDX-License-Identifier: BSD-3-Clause
"""The separable pyramid in training, with a batch norm between its two kinds of convolution.

The depthwise results are as large as the input, once per branch, and cheap: after the pass that
computes their statistics, CUDA's kernels compute them once more where that costs less than to store
and read them. The gradient computes them again in any case. Triton has no kernels for this: there,
on the CPU, in the reference, in forward mode and under torch.func it is PyTorch's operators one
after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .. import _native
from ..dispatch import Problem, select
from ..reference import within
from . import checks, separable_choice
from .checks import Rate
from .family import NATIVE
from .formats import in_strides_of, in_strides_of_image, is_channels_last
from .precision import allows_tf32
from .registration import under_autocast
from .separable_choice import fused_choice
from .separable_norm_operators import OP as _OP
from .separable_norm_operators import wide

Affine = tuple[Tensor | None, Tensor | None]


def atrous_separable_pyramid_batch_norm(
    x: Tensor,
    depthwise_weights: Sequence[Tensor | None],
    pointwise_weights: Sequence[Tensor],
    atrous_rates: Sequence[Rate],
    norms: Sequence[Affine | None],
    *,
    eps: float = 1e-5,
    activation_between: str | None = "relu",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y = cat_b pointwise_b(act(batch_norm(depthwise_b(x))))`` by the statistics of this batch.

    With e the depthwise result and its mean and biased variance over N, H and W, batch_norm(e) is
    ``(e - mean) / sqrt(var + eps) * weight + bias`` (Ioffe and Szegedy 2015, arXiv 1502.03167;
    between the convolutions of a separable ASPP: DeepLab v3+, arXiv 1802.02611). The gradient of y
    is the batch norm's, through mean and variance too, to the first order; those two as results are
    constants to autograd. On CUDA float32 products of the 1x1s are in TF32 where PyTorch's switches
    allow it for convolutions.

    Args:
        x: ``[N, C, H, W]``; any memory format; more than one pixel in N, H and W together.
        depthwise_weights: per branch ``[C, 1, kh_b, kw_b]`` with odd sizes, or None: that branch is
            a plain 1x1 convolution of x, with nothing before it.
        pointwise_weights: per branch ``[O_b, C, 1, 1]``.
        atrous_rates: per branch an int or ``(rate_h, rate_w)``, at least 1.
        norms: per branch ``(weight [C] or None, bias [C] or None)``, and None for plain ones; in
            x's dtype or, beside a low-precision x, in float32.
        eps: above 0.
        activation_between: None or ``"relu"``, where a norm is.
        backend: as in :func:`aspp_ext.atrous_separable_pyramid`, whose implementations these are.

    Returns:
        y ``[N, sum O, H, W]``, channels_last if x or a pointwise weight is; and mean and squares,
        the sum of squared differences from it, ``[branches * C]`` in float32, or float64 for a
        float64 x, zero for plain branches.

    Raises:
        ValueError, TypeError: as :func:`aspp_ext.atrous_separable_pyramid`; also norms that do not
            fit the branches, an eps that is not above 0, and a batch of one pixel.
        NotImplementedError: a second derivative in reverse mode, where kernels compute this.
    """
    checks.check_tensor(_OP, "x", x)
    checks.check_list(_OP, "depthwise_weights", depthwise_weights)
    checks.check_list(_OP, "pointwise_weights", pointwise_weights)
    for name, tensors in (("depthwise", depthwise_weights), ("pointwise", pointwise_weights)):
        for i, t in enumerate(tensors):
            if t is not None or name == "pointwise":
                checks.check_tensor(_OP, f"{name}_weights[{i}]", t)
    rates = checks.flat_rates(_OP, atrous_rates)
    depthwise = [x.new_empty((0,)) if d is None else d for d in depthwise_weights]
    x, depthwise, pointwise = under_autocast(x, depthwise, list(pointwise_weights))
    checks.check_separable(_OP, x, depthwise, pointwise, rates)
    _check_norms(x, depthwise, norms)
    checks.check_activation(_OP, "activation_between", activation_between)
    checks.check_number(_OP, "eps", eps)
    if not eps > 0:
        raise ValueError(f"{_OP}: eps must be above 0, got {eps}")
    if x.size(0) * x.size(2) * x.size(3) < 2:
        raise ValueError(
            f"{_OP}: x must have more than 1 value per channel in training, got shape "
            f"{list(x.shape)}"
        )
    # It is this operator's implementations that are chosen from.
    problem = Problem(
        "atrous_separable_pyramid", x, tuple(pointwise), tuple(d for d in depthwise if d.numel())
    )
    implementation = select(problem, backend)
    weight, bias = (_joint(x, norms, i) for i in (0, 1))
    relu = activation_between == "relu"
    has_kernels = implementation.name == "cuda" or (
        implementation.name == "cpu" and _native.emulated
    )
    if has_kernels and not _is_transformed():
        return _SeparableBatchNorm.apply(
            *(len(pointwise), rates, relu, eps, allows_tf32(x)),
            *(_stores(x, depthwise, pointwise, rates), x, weight, bias, *depthwise, *pointwise),
        )
    return _composed(x, depthwise, pointwise, rates, weight, bias, eps, relu)


def _is_transformed() -> bool:
    """In forward mode or under torch.func, whose derivatives PyTorch's operators alone have."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _check_norms(x: Tensor, depthwise: Sequence[Tensor], norms: Any) -> None:
    checks.check_list(_OP, "norms", norms)
    if len(norms) != len(depthwise):
        raise ValueError(
            f"{_OP}: norms must have one entry per branch, got {len(norms)} for {len(depthwise)} "
            "branches"
        )
    for b, pair in enumerate(norms):
        if not (pair is None or (isinstance(pair, (list, tuple)) and len(pair) == 2)):
            raise TypeError(
                f"{_OP}: norms[{b}] must be None or (weight, bias), got {type(pair).__name__}"
            )
        if pair is None and depthwise[b].numel():
            raise ValueError(
                f"{_OP}: norms[{b}] must be (weight, bias) where the branch has a depthwise "
                "weight, got None"
            )
        if pair is not None and not depthwise[b].numel():
            raise ValueError(
                f"{_OP}: norms[{b}] must be None where the branch has no depthwise weight, got a "
                "pair"
            )
        for name, t in zip(("weight", "bias"), pair or (), strict=False):
            if t is not None:
                _check_norm(x, f"norms[{b}] {name}", t)


def _check_norm(x: Tensor, name: str, t: Any) -> None:
    checks.check_tensor(_OP, name, t)
    if t.dtype not in (x.dtype, wide(x.dtype)):
        names = dict.fromkeys(checks.dtype_name(d) for d in (x.dtype, wide(x.dtype)))
        raise TypeError(
            f"{_OP}: {name} must have dtype {' or '.join(names)} beside x, got "
            f"{checks.dtype_name(t.dtype)}"
        )
    if t.device != x.device:
        raise ValueError(f"{_OP}: {name} must be on x's device {x.device}, got {t.device}")
    if t.dim() != 1 or t.size(0) != x.size(1):
        raise ValueError(
            f"{_OP}: {name} must have one value per channel ({x.size(1)}), got shape "
            f"{list(t.shape)}"
        )


def _joint(x: Tensor, norms: Sequence[Affine | None], which: int) -> Tensor:
    """Weight (0) or bias (1) of all branches ``[branches * C]`` in the dtype of sums."""
    neutral = x.new_full((x.size(1),), 1 - which, dtype=wide(x.dtype))
    given = [None if pair is None else pair[which] for pair in norms]
    return torch.cat([neutral if v is None else v.to(neutral.dtype) for v in given])


def _stores(
    x: Tensor, depthwise: Sequence[Tensor], pointwise: Sequence[Tensor], rates: list[int]
) -> bool:
    """Whether the statistics' pass stores the depthwise results.

    ASPP_EXT_SEPARABLE decides first, as in the forward: "fused" computes them again. The planner
    cannot be traced: a compiled step computes them again, too.
    """
    wish = separable_choice.way
    if wish in ("fused", "stored"):
        return wish == "stored"
    if torch.compiler.is_compiling() or x.device.type not in ("cpu", "cuda"):
        return False
    kernels = [(d.size(2), d.size(3)) if d.numel() else (1, 1) for d in depthwise]
    try:
        choice = fused_choice(x, kernels, rates, [p.size(0) for p in pointwise])
    except ImportError:
        return False
    return not choice.recomputes_in_batch_norm


def _composed(
    x: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    rates: list[int],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by PyTorch's operators; every gradient is theirs."""
    channels = x.size(1)
    means, squares, results = [], [], []
    for b, (d, p) in enumerate(zip(depthwise, pointwise, strict=True)):
        own = slice(b * channels, (b + 1) * channels)
        operand = x
        mean = var = torch.zeros_like(bias[own])
        if d.numel():
            rate = [within(*of) for of in zip(rates[2 * b : 2 * b + 2], x.shape[2:], strict=True)]
            padding = [r * (k - 1) // 2 for r, k in zip(rate, d.shape[2:], strict=True)]
            e = F.conv2d(x, d, None, 1, padding, rate, channels)
            with torch.no_grad():
                var, mean = torch.var_mean(e.to(bias.dtype), (0, 2, 3), correction=0)
            operand = F.batch_norm(e, None, None, weight[own], bias[own], True, 0.0, eps)
            operand = torch.relu(operand) if relu else operand
        means.append(mean)
        squares.append(var * (x.size(0) * x.size(2) * x.size(3)))
        results.append(F.conv2d(operand, p))
    last = any(is_channels_last(t) for t in (x, *pointwise))
    form = torch.channels_last if last else torch.contiguous_format
    y = torch.cat(results, 1).contiguous(memory_format=form)
    return y, torch.cat(means).detach(), torch.cat(squares).detach()


class _SeparableBatchNorm(torch.autograd.Function):
    """``apply(branches, rates, relu, eps, tf32, store, x, weight, bias, *depthwise, *pointwise)``
    with weight and bias ``[branches * C]`` -> y, mean, squares."""

    @staticmethod
    def forward(
        ctx: Any,
        branches: int,
        rates: list[int],
        relu: bool,
        eps: float,
        tf32: bool,
        store: bool,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        *convolutions: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        depthwise, pointwise = list(convolutions[:branches]), list(convolutions[branches:])
        statistics = NATIVE.op("atrous_depthwise_statistics")
        mean, squares, stored = statistics(x, depthwise, rates, store)
        invstd = (squares / (x.size(0) * x.size(2) * x.size(3)) + eps).rsqrt()
        scale, shift = _affine(weight, bias, mean, invstd)
        forward = NATIVE.op("atrous_separable_norm")
        y = forward(x, depthwise, pointwise, rates, scale, shift, relu, stored, tf32)
        ctx.save_for_backward(x, weight, bias, mean, invstd, *convolutions)
        ctx.settings = (branches, rates, relu, tf32)
        ctx.mark_non_differentiable(mean, squares)
        return y, mean, squares

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_statistics: Any) -> Any:
        x, weight, bias, mean, invstd, *convolutions = ctx.saved_tensors
        needs = ctx.needs_input_grad[6:]
        arguments = (grad, x, weight, bias, mean, invstd, *convolutions)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _SeparableBatchNormBackward.apply(*ctx.settings, needs, *arguments)
        else:
            grads = _gradients(*ctx.settings, needs, *arguments)
        return (*[None] * 6, *grads)


class _SeparableBatchNormBackward(torch.autograd.Function):
    """The gradient as a function, so that its own derivative is refused in words."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        return _gradients(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"{_OP}: second derivatives are not available; use backend='reference'"
        )


def _affine(weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift ``[branches * C]``; the gradient needs the bits of the forward."""
    scale = weight * invstd
    return scale, bias - mean * scale


def _gradients(
    branches: int,
    rates: list[int],
    relu: bool,
    tf32: bool,
    needs: Sequence[bool],
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    invstd: Tensor,
    *convolutions: Tensor,
) -> tuple[Tensor | None, ...]:
    """Of x, weight, bias, depthwise and pointwise; None where it is not needed.

    With m the gradient of what the norm returns and n = N * H * W
      of bias  sum m        of weight  invstd * (sum m e - mean * sum m)
      of e     scale * m - scale / n * (of bias + invstd * (e - mean) * of weight)
    which is ``scale * m + a + b * e``.
    """
    of_x, of_weight, of_bias, *of_convolutions = needs
    of_depthwise, of_pointwise = (
        any(of_convolutions[:branches]),
        any(of_convolutions[branches:]),
    )
    scale, shift = _affine(weight, bias, mean, invstd)
    convolutions_of = (list(convolutions[:branches]), list(convolutions[branches:]))
    arguments = (grad, x, *convolutions_of, rates, scale, shift, relu)
    grad_x: Any = None
    grad_weight = grad_bias = None
    a = b = torch.zeros_like(scale)
    if of_x or of_depthwise or of_weight or of_bias:
        products, grad_bias = NATIVE.op("atrous_separable_norm_sums")(*arguments, tf32)
        grad_weight = invstd * (products - mean * grad_bias)
        n = x.size(0) * x.size(2) * x.size(3)
        b = -scale * invstd * grad_weight / n
        a = -scale * grad_bias / n - b * mean
    grads: list[Any] = [None] * len(convolutions)
    if of_x or of_depthwise or of_pointwise:
        backward = NATIVE.op("atrous_separable_norm_backward")
        grad_x, d, p = backward(*arguments, a, b, of_x, of_depthwise, of_pointwise, tf32)
        grads[:branches] = d or grads[:branches]
        grads[branches:] = p or grads[branches:]
    wanted = zip(grads, convolutions, of_convolutions, strict=True)
    return (
        in_strides_of_image(x, grad_x) if of_x else None,
        grad_weight if of_weight else None,
        grad_bias if of_bias else None,
        *(in_strides_of(t, g) if needed and t.numel() else None for g, t, needed in wanted),
    )
