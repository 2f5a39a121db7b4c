# SPDX-License-Identifier: BSD-3-Clause
"""``atrous_separable_pyramid``: depthwise then pointwise, fused, for every branch at once."""

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
from .family import FAMILIES, Family
from .formats import empty_image
from .precision import allows_tf32
from .pyramid import epilogue
from .registration import (
    fold_image,
    register_autocast,
    register_fake,
    register_vmap,
    under_autocast,
)
from .separable_autograd import (
    AtrousSeparablePyramid,
    AtrousSeparablePyramidBackward,
    unpack_backward,
)
from .sibling import define_sibling

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
    1802.02611, section 3.1). On CUDA float32 products of the 1x1s are in TF32 where PyTorch's
    switches allow it for convolutions.

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
    depthwise = [x.new_empty((0,)) if d is None else d for d in depthwise_weights]
    between_scale, between_shift = _between_lists(x, between, len(depthwise))
    x, depthwise, pointwise, between_scale, between_shift, bias, scale, shift = under_autocast(
        x, depthwise, list(pointwise_weights), between_scale, between_shift, bias, scale, shift
    )
    channels = checks.check_separable(_OP, x, depthwise, pointwise, rates)
    checks.check_between(_OP, x, between_scale, between_shift, depthwise)
    if not between_scale:  # which the operator takes for None
        raise ValueError(
            f"{_OP}: between must have one entry per branch, got 0 for {len(depthwise)} branches"
        )
    checks.check_activation(_OP, "between_activation", between_activation)
    checks.check_vector(_OP, "bias", bias, x, channels)
    checks.check_vector(_OP, "scale", scale, x, channels)
    checks.check_vector(_OP, "shift", shift, x, channels, per_sample=True)
    checks.check_activation(_OP, "activation", activation)
    given = tuple(d for d in depthwise if d.numel())
    problem = Problem(_OP, x, tuple(pointwise), given, (*between_scale, *between_shift))
    implementation = select(problem, backend)
    if any(s.numel() for s in between_scale) and between_activation is None:
        pointwise, constant = _fold_affine(pointwise, between_scale, between_shift)
        bias = constant if bias is None else bias + constant
        between_scale = between_shift = [x.new_empty((0,))] * len(pointwise)
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
        allows_tf32(x),
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
        scale.append(x.new_empty((0,)) if pair is None else pair[0])
        shift.append(x.new_empty((0,)) if pair is None else pair[1])
    return scale, shift


def _fold_affine(
    pointwise: list[Tensor], scale: list[Tensor], shift: list[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """``p (s d + t) = (p s) d + p t``: without an activation the affine map is part of p."""
    folded, constants = [], []
    for p, s, t in zip(pointwise, scale, shift, strict=True):
        given = s.numel() > 0
        folded.append(p * s[None, :, None, None] if given else p)
        constants.append(p.flatten(1) @ t if given else p.new_zeros((p.size(0),)))
    return folded, torch.cat(constants)


def _with_epilogue(
    family: Family,
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
    tf32: bool = False,
) -> Tensor | None:
    """With gradients, the epilogue is PyTorch's, so that its gradient is too."""
    if scale is None and shift is None and not relu:
        return None
    between = (between_scale, between_shift, between_relu)
    y = family.op(_OP)(x, depthwise, pointwise, rates, *between, None, None, False, tf32)
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
    tf32=False,
):
    channels = checks.check_separable(_OP, x, depthwise, pointwise, rates)
    checks.check_between(_OP, x, between_scale, between_shift, depthwise)
    checks.check_vector(_OP, "scale", scale, x, channels)
    checks.check_vector(_OP, "shift", shift, x, channels, per_sample=True)
    return channels


def _check_backward(
    grad, x, depthwise, pointwise, rates, between_scale, between_shift, between_relu, *rest
):
    channels = _check(x, depthwise, pointwise, rates, between_scale, between_shift)
    checks.check_grad(_OP, grad, x, channels)


def _fake(
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
    tf32=False,
):
    channels = _check(
        x, depthwise, pointwise, rates, between_scale, between_shift, scale=scale, shift=shift
    )
    return empty_image(x, channels, [x, *pointwise])


def _fake_backward(
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
    tf32=False,
):
    _check_backward(
        grad, x, depthwise, pointwise, rates, between_scale, between_shift, between_relu
    )

    def like(tensors, needed):
        return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors] * needed

    return (
        empty_image(x, x.size(1), [x]) if need_x else x.new_empty((0,)),
        like(depthwise, need_depthwise),
        like(pointwise, need_pointwise),
        like(between_scale, need_between),
        like(between_shift, need_between),
    )


def _register(family: Family) -> None:
    forward, backward = (family.op(name).default for name in (_OP, f"{_OP}_backward"))
    register_fake(forward, _fake)
    register_fake(backward, _fake_backward)
    register(
        *(forward, AtrousSeparablePyramid, family),
        check=_check,
        before=lambda *arguments: _with_epilogue(family, *arguments),
    )
    register(
        *(backward, AtrousSeparablePyramidBackward, family),
        check=_check_backward,
        unpack=unpack_backward,
    )
    register_autocast(forward)
    register_vmap(forward, fold_image(forward))
    register_vmap(backward)


if _native.cpu_missing is None:
    define_sibling(_OP, _check)
    define_sibling(f"{_OP}_backward", _check_backward)
    for _family in FAMILIES:
        _register(_family)
