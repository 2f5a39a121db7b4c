# SPDX-License-Identifier: BSD-3-Clause
"""Gradients of ``atrous_separable_pyramid``, to any order where nothing between is non-linear.

Without an activation in between, ``T(x, d, p, g) = <g, p * (d * x)>`` is linear in each argument,
so the backward operator differentiates into itself and the forward. With one, the second derivative
is refused in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .family import NATIVE, family_of
from .formats import in_strides_of, in_strides_of_image
from .pyramid import add, zeros_for

_OP, _BACKWARD = "atrous_separable_pyramid", "atrous_separable_pyramid_backward"


class AtrousSeparablePyramid(torch.autograd.Function):
    """``apply(branches, rates, between_relu, tf32, x, *depthwise, *pointwise, *scale, *shift)``.

    ``branches`` is their number, and that of the tensors of each kind; what a branch has not, a
    depthwise weight or what is between, is an empty tensor of shape ``[0]``.
    ``tf32`` allows float32 products of the 1x1s to be rounded to TF32 on CUDA, in the gradients
    too.
    """

    @staticmethod
    def pack(
        x: Tensor,
        depthwise: Sequence[Tensor],
        pointwise: Sequence[Tensor],
        rates: list[int],
        scale: Sequence[Tensor],
        shift: Sequence[Tensor],
        relu: bool = False,
        _scale: None = None,
        _shift: None = None,
        _relu: bool = False,
        tf32: bool = False,
    ) -> tuple[Any, ...]:
        return (len(pointwise), rates, relu, tf32, x, *depthwise, *pointwise, *scale, *shift)

    @staticmethod
    def lists(branches: int, tensors: Sequence[Any]) -> list[list[Any]]:
        """depthwise, pointwise, between scale and between shift; the last two may be empty."""
        return [list(tensors[i * branches : (i + 1) * branches]) for i in range(4)]

    @staticmethod
    def call(
        op: Any, branches: int, rates: list[int], relu: bool, tf32: bool, x: Tensor, *rest: Tensor
    ) -> Any:
        d, p, s, t = AtrousSeparablePyramid.lists(branches, rest)
        return op(x, d, p, rates, s, t, relu, None, None, False, tf32)

    @staticmethod
    def forward(branches: int, rates: list[int], relu: bool, tf32: bool, *tensors: Tensor) -> Any:
        return AtrousSeparablePyramid.call(NATIVE.op(_OP), branches, rates, relu, tf32, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.branches, ctx.rates, ctx.relu, ctx.tf32, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, *rest = ctx.saved_tensors
        d, p, s, t = AtrousSeparablePyramid.lists(ctx.branches, rest)
        of_x, *of_rest = ctx.needs_input_grad[-len(rest) - 1 :]
        of_d, of_p, of_s, of_t = AtrousSeparablePyramid.lists(ctx.branches, of_rest)
        needs = (of_x, any(of_d), any(of_p), any(of_s) or any(of_t))
        op = family_of(ctx).op(_BACKWARD)
        grad_x, *grads = op(grad, x, d, p, ctx.rates, s, t, ctx.relu, *needs, ctx.tf32)
        filled = [_gradients(g, kind) for g, kind in zip(grads, (d, p, s, t), strict=True)]
        grad_x = in_strides_of_image(x, grad_x) if of_x else None
        return (*[None] * 4, grad_x, *[g for kind in filled for g in kind])

    @staticmethod
    def jvp(ctx: Any, _b: Any, _r: Any, _relu: Any, _tf32: Any, t_x: Any, *t_rest: Any) -> Any:
        x, *rest = ctx.saved_tensors
        d, p, s, _ = AtrousSeparablePyramid.lists(ctx.branches, rest)
        if any(t.numel() for t in s):
            raise NotImplementedError(
                f"{_OP}: forward-mode derivatives need between_activation=None, got 'relu'"
            )
        t_d, t_p, _, _ = AtrousSeparablePyramid.lists(ctx.branches, t_rest)
        return _variation(ctx, x, d, p, t_x, t_d, t_p)


def _gradients(grads: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """An operator's list of gradients, which is empty when none was asked for."""
    if not grads:
        return [None] * len(inputs)
    return [in_strides_of(t, g) if t.numel() else None for g, t in zip(grads, inputs, strict=True)]


def _only_separable(d: Sequence[Tensor], p: Sequence[Tensor]) -> list[Tensor]:
    """p, silenced on plain branches: a variation of d does not reach those."""
    return [q if w.numel() else torch.zeros_like(q) for w, q in zip(d, p, strict=True)]


def _variation(ctx: Any, x: Tensor, d: Any, p: Any, v_x: Any, v_d: Any, v_p: Any) -> Tensor | None:
    """S(v_x, d, p) + S(x, v_d, p) + S(x, d, v_p) of what is given."""
    op = family_of(ctx).op(_OP)
    plain: tuple[Any, ...] = (ctx.rates, [], [], False, None, None, False, ctx.tf32)
    parts = [None if v_x is None else op(v_x, d, p, *plain)]
    if any(v is not None for v in v_d):
        parts.append(op(x, zeros_for(v_d, d), _only_separable(d, p), *plain))
    if any(v is not None for v in v_p):
        parts.append(op(x, d, zeros_for(v_p, p), *plain))
    return add(*parts)


class AtrousSeparablePyramidBackward(torch.autograd.Function):
    """``apply(branches, rates, relu, needs, tf32, grad, x, *depthwise, *pointwise, *scale,
    *shift)``; ``needs`` are those of x, depthwise, pointwise and what is between."""

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
        need_x: bool,
        need_depthwise: bool,
        need_pointwise: bool,
        need_between: bool,
        tf32: bool = False,
    ) -> tuple[Any, ...]:
        needs = (need_x, need_depthwise, need_pointwise, need_between)
        rest = (*depthwise, *pointwise, *scale, *shift)
        return (len(pointwise), rates, relu, needs, tf32, grad, x, *rest)

    @staticmethod
    def call(
        op: Any, branches: int, rates: Any, relu: bool, needs: Any, tf32: bool, *tensors: Tensor
    ) -> Any:
        grad, x, *rest = tensors
        d, p, s, t = AtrousSeparablePyramid.lists(branches, rest)
        grad_x, *lists = op(grad, x, d, p, rates, s, t, relu, *needs, tf32)
        return (grad_x, *[g for kind in lists for g in kind])

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return AtrousSeparablePyramidBackward.call(NATIVE.op(_BACKWARD), *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.branches, ctx.rates, ctx.relu, ctx.needs, ctx.tf32, *tensors = inputs
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
        by_grad = _variation(ctx, x, d, p, v_x, v_d, v_p)
        none: list[Any] = [None] * ctx.branches
        by_x, by_d, by_p = None, none, none

        def op(x: Tensor, d: Any, p: Any, *needs: bool) -> Any:
            operator = family_of(ctx).op(_BACKWARD)
            return operator(grad, x, d, p, ctx.rates, [], [], False, *needs, False, ctx.tf32)

        def merge(old: Any, grads: Any, like: Any) -> list[Any]:
            return _gradients([add(o, g) for o, g in zip(old, grads, strict=True)], like)

        if v_x is not None:
            _, gd, gp, _, _ = op(v_x, d, p, False, True, True)
            by_d, by_p = merge(by_d, gd, d), merge(by_p, gp, p)
        if any(t is not None for t in v_d):
            u, q = zeros_for(v_d, d), _only_separable(d, p)
            gx, _, gp, _, _ = op(x, u, q, True, False, True)
            gp = [g if t.numel() else torch.zeros_like(g) for g, t in zip(gp, d, strict=True)]
            by_x, by_p = add(by_x, gx), merge(by_p, gp, p)
        if any(t is not None for t in v_p):
            gx, gd, _, _, _ = op(x, d, zeros_for(v_p, p), True, True, False)
            by_x, by_d = add(by_x, gx), merge(by_d, gd, d)
        return (*[None] * 5, by_grad, by_x, *by_d, *by_p, *[None] * len(s + t))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            f"{_OP}: forward mode over reverse mode is not available; use reverse over reverse or "
            "backend='reference'"
        )


def unpack_backward(outputs: Any, *arguments: Any) -> Any:
    branches = len(arguments[3])
    grad_x, *rest = outputs
    of_between = arguments[11] and len(arguments[5]) > 0
    lists: list[list[Tensor]] = []
    for needed in (arguments[9], arguments[10], of_between, of_between):
        lists.append(list(rest[:branches]) if needed else [])
        rest = rest[branches:] if needed else rest
    return (grad_x, *lists)
