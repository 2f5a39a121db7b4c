# SPDX-License-Identifier: BSD-3-Clause
"""``atrous_separable_pyramid``: depthwise then pointwise, fused, for every branch at once.

Without an activation in between, ``T(x, d, p, g) = <g, p * (d * x)>`` is linear in each argument,
so the backward operator differentiates into itself and the forward, to any order. With one, the
second derivative is refused in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._autograd_key import register
from ..dispatch import Problem, select
from . import checks
from .checks import Rate
from .formats import empty_image
from .pyramid import add, epilogue, zeros_for
from .registration import (
    fold_image,
    library,
    register_autocast,
    register_vmap,
    under_autocast,
)

_OP = "atrous_separable_pyramid"
Affine = tuple[Tensor, Tensor]


def atrous_separable_pyramid(
    x: Tensor,
    depthwise_weights: Sequence[Tensor | None],
    pointwise_weights: Sequence[Tensor],
    atrous_rates: Sequence[Rate],
    *,
    between: Sequence[Affine | None] | None = None,
    between_activation: str | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """All depthwise-separable atrous convolutions of a pyramid, concatenated over channels.

    Branch b is ``pointwise_b(act(scale_b * depthwise_b(x) + shift_b))`` (DeepLab v3+, arXiv
    1802.02611, section 3.1); the depthwise result never exists as a whole.

    Args:
        x: ``[N, C, H, W]``; any memory format.
        depthwise_weights: per branch ``[C, 1, kh_b, kw_b]`` with odd sizes, or None: that branch
            is a plain 1x1 convolution.
        pointwise_weights: per branch ``[O_b, C, 1, 1]``.
        atrous_rates: per branch an int or ``(rate_h, rate_w)``, at least 1.
        between: None, or per branch None or ``(scale [C], shift [C])``, a folded normalisation.
        between_activation: None or ``"relu"``, applied where ``between`` is given.
        bias, scale, shift, activation, backend: as in :func:`aspp_ext.atrous_pyramid`.

    Returns:
        ``[N, sum O, H, W]``, channels_last if x or a pointwise weight is.

    Raises:
        ValueError: shapes, kernel sizes, rates or list lengths that do not fit, or an unknown
            backend.
        TypeError: an argument that is no tensor, or of another dtype than x.
        NotImplementedError: the second derivative through ``between_activation``.
    """
    checks.check_tensor(_OP, "x", x)
    checks.check_list(_OP, "depthwise_weights", depthwise_weights)
    checks.check_list(_OP, "pointwise_weights", pointwise_weights)
    for name, tensors in (("depthwise", depthwise_weights), ("pointwise", pointwise_weights)):
        for b, t in enumerate(tensors):
            if t is not None or name == "pointwise":
                checks.check_tensor(_OP, f"{name}_weights[{b}]", t)
    rates = checks.flat_rates(_OP, atrous_rates)
    depthwise = [x.new_empty(0) if d is None else d for d in depthwise_weights]
    between_scale, between_shift = _between_lists(x, between, len(depthwise))
    x, depthwise, pointwise, between_scale, between_shift, bias, scale, shift = under_autocast(
        x, depthwise, list(pointwise_weights), between_scale, between_shift, bias, scale, shift
    )
    channels = checks.check_separable(_OP, x, depthwise, pointwise, rates)
    checks.check_between(_OP, x, between_scale, between_shift, depthwise)
    checks.check_activation(_OP, "between_activation", between_activation)
    checks.check_vector(_OP, "bias", bias, x, channels)
    checks.check_vector(_OP, "scale", scale, x, channels)
    checks.check_vector(_OP, "shift", shift, x, channels, per_sample=True)
    checks.check_activation(_OP, "activation", activation)
    problem = Problem(_OP, x, tuple(d for d in depthwise if d.numel()) + tuple(pointwise))
    implementation = select(problem, backend)
    if any(s.numel() for s in between_scale) and between_activation is None:
        pointwise, constant = _fold_affine(pointwise, between_scale, between_shift)
        bias = constant if bias is None else bias + constant
        between_scale = between_shift = [x.new_empty(0)] * len(pointwise)
    if bias is not None:
        moved = bias if scale is None else bias * scale
        shift = moved if shift is None else shift + moved
    return implementation.call(
        x,
        depthwise,
        pointwise,
        rates,
        between_scale,
        between_shift,
        between_activation == "relu",
        scale,
        shift,
        activation == "relu",
    )


def atrous_separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    atrous_rate: Rate,
    *,
    between: Affine | None = None,
    **keywords: Any,
) -> Tensor:
    """One branch of :func:`atrous_separable_pyramid`: ``[N, C, H, W] -> [N, O, H, W]``.

    Args:
        depthwise_weight: ``[C, 1, kh, kw]``.
        pointwise_weight: ``[O, C, 1, 1]``.
        atrous_rate: an int or ``(rate_h, rate_w)``.
        between: None or ``(scale [C], shift [C])``.
        **keywords: as in :func:`atrous_separable_pyramid`.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`atrous_separable_pyramid`.
    """
    return atrous_separable_pyramid(
        x,
        [depthwise_weight],
        [pointwise_weight],
        [atrous_rate],
        between=None if between is None else [between],
        **keywords,
    )


def _between_lists(
    x: Tensor, between: Sequence[Affine | None] | None, branches: int
) -> tuple[list[Tensor], list[Tensor]]:
    """One tensor per branch, empty where nothing is between.

    Never empty lists: AOTInductor's runtime would hand those over as None.
    """
    if between is None:
        between = [None] * branches
    checks.check_list(_OP, "between", between)
    scale, shift = [], []
    for b, pair in enumerate(between):
        if not (pair is None or (isinstance(pair, (list, tuple)) and len(pair) == 2)):
            raise TypeError(
                f"{_OP}: between[{b}] must be None or (scale, shift), got {type(pair).__name__}"
            )
        for name, t in zip(("scale", "shift"), pair or (), strict=False):
            checks.check_tensor(_OP, f"between[{b}] {name}", t)
        scale.append(x.new_empty(0) if pair is None else pair[0])
        shift.append(x.new_empty(0) if pair is None else pair[1])
    return scale, shift


def _fold_affine(
    pointwise: list[Tensor], scale: list[Tensor], shift: list[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """``p (s d + t) = (p s) d + p t``: without an activation the affine map is part of p."""
    folded, constants = [], []
    for p, s, t in zip(pointwise, scale, shift, strict=True):
        given = s.numel() > 0
        folded.append(p * s[None, :, None, None] if given else p)
        constants.append(p.flatten(1) @ t if given else p.new_zeros(p.size(0)))
    return folded, torch.cat(constants)


def _ops() -> Any:
    return torch.ops.aspp_ext


class AtrousSeparablePyramid(torch.autograd.Function):
    """``apply(branches, rates, between_relu, x, *depthwise, *pointwise, *scale, *shift)``."""

    @staticmethod
    def pack(
        x: Tensor,
        depthwise: Sequence[Tensor],
        pointwise: Sequence[Tensor],
        rates: list[int],
        scale: Sequence[Tensor],
        shift: Sequence[Tensor],
        relu: bool = False,
        *_: Any,
    ) -> tuple[Any, ...]:
        return (len(pointwise), rates, relu, x, *depthwise, *pointwise, *scale, *shift)

    @staticmethod
    def lists(branches: int, tensors: Sequence[Any]) -> list[list[Any]]:
        """depthwise, pointwise, between scale and between shift; the last two may be empty."""
        return [list(tensors[i * branches : (i + 1) * branches]) for i in range(4)]

    @staticmethod
    def call(op: Any, branches: int, rates: list[int], relu: bool, x: Tensor, *rest: Tensor) -> Any:
        d, p, s, t = AtrousSeparablePyramid.lists(branches, rest)
        return op(x, d, p, rates, s, t, relu, None, None, False)

    @staticmethod
    def forward(branches: int, rates: list[int], relu: bool, x: Tensor, *rest: Tensor) -> Tensor:
        op = _ops().atrous_separable_pyramid
        return AtrousSeparablePyramid.call(op, branches, rates, relu, x, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.branches, ctx.rates, ctx.relu, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, *rest = ctx.saved_tensors
        d, p, s, t = AtrousSeparablePyramid.lists(ctx.branches, rest)
        of_x, *of_rest = ctx.needs_input_grad[-len(rest) - 1 :]
        of_d, of_p, of_s, of_t = AtrousSeparablePyramid.lists(ctx.branches, of_rest)
        needs = (of_x, any(of_d), any(of_p), any(of_s) or any(of_t))
        grad_x, *grads = _ops().atrous_separable_pyramid_backward(
            grad, x, d, p, ctx.rates, s, t, ctx.relu, *needs
        )
        filled = [_gradients(g, kind) for g, kind in zip(grads, (d, p, s, t), strict=True)]
        return (None, None, None, grad_x if of_x else None, *[g for kind in filled for g in kind])

    @staticmethod
    def jvp(ctx: Any, _b: Any, _r: Any, _relu: Any, t_x: Any, *t_rest: Any) -> Any:
        x, *rest = ctx.saved_tensors
        d, p, s, _ = AtrousSeparablePyramid.lists(ctx.branches, rest)
        if any(t.numel() for t in s):
            raise NotImplementedError(
                f"{_OP}: forward-mode derivatives need between_activation=None, got 'relu'"
            )
        t_d, t_p, _, _ = AtrousSeparablePyramid.lists(ctx.branches, t_rest)
        return _variation(ctx.rates, x, d, p, t_x, t_d, t_p)


def _gradients(grads: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """An operator's list of gradients, which is empty when none was asked for."""
    if not grads:
        return [None] * len(inputs)
    return [g if t.numel() else None for g, t in zip(grads, inputs, strict=True)]


def _only_separable(d: Sequence[Tensor], p: Sequence[Tensor]) -> list[Tensor]:
    """p, silenced on plain branches: a variation of d does not reach those."""
    return [q if w.numel() else torch.zeros_like(q) for w, q in zip(d, p, strict=True)]


def _variation(
    rates: list[int], x: Tensor, d: Any, p: Any, v_x: Any, v_d: Any, v_p: Any
) -> Tensor | None:
    """S(v_x, d, p) + S(x, v_d, p) + S(x, d, v_p) of what is given."""
    op = _ops().atrous_separable_pyramid
    parts = [None if v_x is None else op(v_x, d, p, rates, [], [])]
    if any(v is not None for v in v_d):
        parts.append(op(x, zeros_for(v_d, d), _only_separable(d, p), rates, [], []))
    if any(v is not None for v in v_p):
        parts.append(op(x, d, zeros_for(v_p, p), rates, [], []))
    return add(*parts)


class AtrousSeparablePyramidBackward(torch.autograd.Function):
    """``apply(branches, rates, relu, needs, grad, x, *depthwise, *pointwise, *scale, *shift)``."""

    @staticmethod
    def pack(
        grad: Tensor,
        x: Tensor,
        depthwise: Sequence[Tensor],
        pointwise: Sequence[Tensor],
        rates: list[int],
        scale: Sequence[Tensor],
        shift: Sequence[Tensor],
        relu: bool,
        *needs: bool,
    ) -> tuple[Any, ...]:
        rest = (*depthwise, *pointwise, *scale, *shift)
        return (len(pointwise), rates, relu, needs, grad, x, *rest)

    @staticmethod
    def call(
        op: Any, branches: int, rates: Any, relu: bool, needs: Any, grad: Tensor, *rest: Tensor
    ) -> Any:
        x, *tensors = rest
        d, p, s, t = AtrousSeparablePyramid.lists(branches, tensors)
        grad_x, *lists = op(grad, x, d, p, rates, s, t, relu, *needs)
        return (grad_x, *[g for kind in lists for g in kind])

    @staticmethod
    def forward(branches: int, rates: Any, relu: bool, needs: Any, *tensors: Tensor) -> Any:
        op = _ops().atrous_separable_pyramid_backward
        return AtrousSeparablePyramidBackward.call(op, branches, rates, relu, needs, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.branches, ctx.rates, ctx.relu, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def outputs(ctx: Any, values: Sequence[Any], d: Sequence[Tensor]) -> tuple[Any, Any, Any]:
        """Cotangents of grad_x, of the depthwise and of the pointwise gradients, or None."""
        of_x, of_d, of_p, _ = ctx.needs
        rest = list(values[1:])
        v_d = rest[: ctx.branches] if of_d else [None] * ctx.branches
        rest = rest[ctx.branches :] if of_d else rest
        v_p = rest[: ctx.branches] if of_p else [None] * ctx.branches
        v_d = [v if t.numel() else None for v, t in zip(v_d, d, strict=True)]
        return (values[0] if of_x else None, v_d, v_p)

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> Any:
        grad, x, *rest = ctx.saved_tensors
        d, p, s, t = AtrousSeparablePyramid.lists(ctx.branches, rest)
        if any(tensor.numel() for tensor in s):
            raise NotImplementedError(
                f"{_OP}: second derivatives need between_activation=None, got 'relu'; "
                "use backend='reference'"
            )
        v_x, v_d, v_p = AtrousSeparablePyramidBackward.outputs(ctx, v, d)
        op = _ops().atrous_separable_pyramid_backward
        by_grad = _variation(ctx.rates, x, d, p, v_x, v_d, v_p)
        none: list[Any] = [None] * ctx.branches
        by_x, by_d, by_p = None, none, none

        def merge(old: Any, grads: Any, like: Any) -> list[Any]:
            return [add(o, g) for o, g in zip(old, _gradients(grads, like), strict=True)]

        if v_x is not None:
            _, gd, gp, _, _ = op(
                grad, v_x, d, p, ctx.rates, [], [], False, False, True, True, False
            )
            by_d, by_p = merge(by_d, gd, d), merge(by_p, gp, p)
        if any(t is not None for t in v_d):
            u, q = zeros_for(v_d, d), _only_separable(d, p)
            gx, _, gp, _, _ = op(grad, x, u, q, ctx.rates, [], [], False, True, False, True, False)
            gp = [g if t.numel() else torch.zeros_like(g) for g, t in zip(gp, d, strict=True)]
            by_x, by_p = add(by_x, gx), merge(by_p, gp, p)
        if any(t is not None for t in v_p):
            gx, gd, _, _, _ = op(
                grad,
                x,
                d,
                zeros_for(v_p, p),
                ctx.rates,
                [],
                [],
                False,
                True,
                True,
                False,
                False,
            )
            by_x, by_d = add(by_x, gx), merge(by_d, gd, d)
        return (None, None, None, None, by_grad, by_x, *by_d, *by_p, *[None] * len(s + t))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            f"{_OP}: forward mode over reverse mode is not available; use reverse over reverse or "
            "backend='reference'"
        )


def _unpack_backward(outputs: Any, *arguments: Any) -> Any:
    branches = len(arguments[3])
    grad_x, *rest = outputs
    of_between = arguments[11] and len(arguments[5]) > 0
    lists: list[list[Tensor]] = []
    for needed in (arguments[9], arguments[10], of_between, of_between):
        lists.append(list(rest[:branches]) if needed else [])
        rest = rest[branches:] if needed else rest
    return (grad_x, *lists)


def _with_epilogue(
    x: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    rates: list[int],
    between_scale: Sequence[Tensor],
    between_shift: Sequence[Tensor],
    between_relu: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
) -> Tensor | None:
    """With gradients, the epilogue is PyTorch's, so that its gradient is too."""
    if scale is None and shift is None and not relu:
        return None
    y = _ops().atrous_separable_pyramid(
        x, depthwise, pointwise, rates, between_scale, between_shift, between_relu
    )
    return epilogue(y, scale, shift, relu)


def _check(
    x,
    depthwise,
    pointwise,
    rates,
    between_scale,
    between_shift,
    between_relu=False,
    scale=None,
    shift=None,
    relu=False,
):
    channels = checks.check_separable(_OP, x, depthwise, pointwise, rates)
    checks.check_between(_OP, x, between_scale, between_shift, depthwise)
    checks.check_vector(_OP, "scale", scale, x, channels)
    checks.check_vector(_OP, "shift", shift, x, channels, per_sample=True)
    return channels


def _check_backward(
    grad, x, depthwise, pointwise, rates, between_scale, between_shift, between_relu, *needs
):
    channels = _check(x, depthwise, pointwise, rates, between_scale, between_shift)
    checks.check_grad(_OP, grad, x, channels)


if _native.cpu_missing is None:

    @torch.library.register_fake("aspp_ext::atrous_separable_pyramid")
    def _(
        x,
        depthwise,
        pointwise,
        rates,
        between_scale,
        between_shift,
        between_relu=False,
        scale=None,
        shift=None,
        relu=False,
    ):
        channels = _check(
            x, depthwise, pointwise, rates, between_scale, between_shift, scale=scale, shift=shift
        )
        return empty_image(x, channels, [x, *pointwise])

    @torch.library.register_fake("aspp_ext::atrous_separable_pyramid_backward")
    def _(
        grad,
        x,
        depthwise,
        pointwise,
        rates,
        between_scale,
        between_shift,
        between_relu,
        need_x,
        need_depthwise,
        need_pointwise,
        need_between,
    ):
        _check_backward(
            grad, x, depthwise, pointwise, rates, between_scale, between_shift, between_relu
        )

        def like(tensors, needed):
            return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors] * needed

        return (
            empty_image(x, x.size(1), [x]) if need_x else x.new_empty(0),
            like(depthwise, need_depthwise),
            like(pointwise, need_pointwise),
            like(between_scale, need_between),
            like(between_shift, need_between),
        )

    register(
        library,
        _ops().atrous_separable_pyramid.default,
        AtrousSeparablePyramid,
        check=_check,
        before=_with_epilogue,
    )
    register(
        library,
        _ops().atrous_separable_pyramid_backward.default,
        AtrousSeparablePyramidBackward,
        check=_check_backward,
        unpack=_unpack_backward,
    )
    register_autocast(_ops().atrous_separable_pyramid.default)
    register_vmap(
        _ops().atrous_separable_pyramid.default,
        fold_image(_ops().atrous_separable_pyramid.default),
    )
    register_vmap(_ops().atrous_separable_pyramid_backward.default)
