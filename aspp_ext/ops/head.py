# SPDX-License-Identifier: BSD-3-Clause
"""``aspp_inference``: the whole head with its normalisations folded, in one operator, or its
branches alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._autograd_key import compose_gradient, refuse_gradient
from ..dispatch import Problem, select
from . import checks, head_composed
from .checks import Rate
from .family import NATIVE
from .formats import empty_image
from .polyphase_choice import BY_COST, Decided, policy
from .registration import (
    register_autocast,
    register_fake,
    register_vmap,
    under_autocast,
)

_OP = "aspp_inference"
_WEIGHTS = "polyphase_weights"


def aspp_inference(
    x: Tensor,
    depthwise_weights: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    atrous_rates: Sequence[Rate],
    shift: Tensor,
    pool_weight: Tensor | None,
    pool_shift: Tensor | None,
    project_weight: Tensor | None,
    project_shift: Tensor | None,
    *,
    activation: str | None = "relu",
    project_activation: str | None = "relu",
    backend: str | None = None,
    polyphase: bool | Decided = True,
    prepared: Sequence[Tensor] | None = None,
    channels_last: bool | None = None,
) -> Tensor:
    """Atrous Spatial Pyramid Pooling for inference (DeepLab v3, arXiv 1706.05587, section 3.3).

    ``y = project_act(W_proj cat_b[act(branch_b(x) + shift_b), act(W_pool mean(x) + pool_shift)] +
    project_shift)``, or ``cat_b act(branch_b(x) + shift_b)`` where there is no projection. The
    pooled branch is constant over the plane, so its part of the projection is a per-sample bias and
    is never spread over ``H x W``. Batch normalisation is expected to be folded into weights and
    shifts. Weights whose memory has stride 1 over the output channels (on CUDA: over the input
    channels) are read in place; any other format is packed on each call. Where a gradient is
    needed, the pyramids compute it one behind the other.

    Args:
        x: ``[N, C, H, W]``; any memory format.
        depthwise_weights: per branch ``[C, 1, kh, kw]`` or None (a dense branch).
        weights: per branch ``[O_b, C, kh, kw]`` when dense, ``[O_b, C, 1, 1]`` when separable.
        atrous_rates: per branch an int or ``(rate_h, rate_w)``, at least 1.
        shift: ``[sum O]``.
        pool_weight, pool_shift: ``[Q, C]`` and ``[Q]``, or both None: no image pooling.
        project_weight: ``[P, sum O + Q]``, the pooled columns last, or None: no projection, and
            then no image pooling.
        project_shift: ``[P]``, or ``[N, P]`` per sample, or None with ``project_weight``.
        activation: None or "relu", of the branches and of the pooled one.
        project_activation: None or "relu", of the projection.
        backend: force an implementation; None takes the first that can.
        polyphase: the CPU may compute 3-tap axes by minimal filtering, which multiplies less and
            rounds a little more.
        prepared: :func:`aspp_ext.ops.polyphase_weights` of the same weights, rates and
            ``polyphase`` for x's size, under the same ``ASPP_EXT_POLYPHASE``; without it each call
            transforms the weights anew.
        channels_last: whether the result lies in memory so, or contiguous; None: as x does.

    Returns:
        ``[N, P, H, W]``, or without a projection ``[N, sum O, H, W]``, in x's memory format, unless
        told.

    Raises:
        ValueError: shapes, kernel sizes, rates or list lengths that do not fit, or an unknown
            activation or backend.
        TypeError: an argument that is no tensor, or of another dtype than x, or no bool.
    """
    checks.check_tensor(_OP, "x", x)
    checks.check_list(_OP, "depthwise_weights", depthwise_weights)
    checks.check_list(_OP, "weights", weights)
    named: list[tuple[str, Any]] = [(f"weights[{b}]", w) for b, w in enumerate(weights)]
    named += [
        (f"depthwise_weights[{b}]", d) for b, d in enumerate(depthwise_weights) if d is not None
    ]
    named.append(("shift", shift))
    optional = {
        "pool_weight": pool_weight,
        "project_weight": project_weight,
        "project_shift": project_shift,
    }
    named += [(name, value) for name, value in optional.items() if value is not None]
    if prepared is not None:
        checks.check_list(_OP, "prepared", prepared)
        named += [(f"prepared[{b}]", w) for b, w in enumerate(prepared)]
    for name, value in named:
        checks.check_tensor(_OP, name, value)
    checks.check_activation(_OP, "activation", activation)
    checks.check_activation(_OP, "project_activation", project_activation)
    if not isinstance(polyphase, Decided):
        checks.check_flag(_OP, "polyphase", polyphase)
    if channels_last is not None:
        checks.check_flag(_OP, "channels_last", channels_last)
    rates = checks.flat_rates(_OP, atrous_rates)
    depthwise = [x.new_empty((0,)) if d is None else d for d in depthwise_weights]
    arguments = under_autocast(
        x,
        depthwise,
        list(weights),
        rates,
        shift,
        pool_weight,
        pool_shift,
        project_weight,
        project_shift,
    )
    # What is prepared is in the dtype that the kernel has chosen.
    ready = None if prepared is None else list(prepared)
    relus = (activation is not None, project_activation is not None)
    arguments = (*arguments, policy(polyphase), ready, channels_last, *relus)
    x, depthwise, weights = arguments[:3]
    check_head(*arguments)
    problem = Problem(_OP, x, tuple(weights), tuple(d for d in depthwise if d.numel()))
    return select(problem, backend).call(*arguments)


def check_head(
    x: Tensor,
    depthwise: Sequence[Tensor],
    weights: Sequence[Tensor],
    rates: Sequence[int],
    shift: Tensor,
    pool_weight: Tensor | None,
    pool_shift: Tensor | None,
    project_weight: Tensor | None,
    project_shift: Tensor | None,
    polyphase: int = BY_COST,
    prepared: Sequence[Tensor] | None = None,
    *_: bool | None,
) -> int:
    """Checks the head; returns its number of output channels."""
    if not (len(depthwise) == len(weights)):
        raise ValueError(
            f"{_OP}: depthwise_weights must have one entry per branch, got {len(depthwise)} for "
            f"{len(weights)} branches"
        )
    channels = checks.check_dense(_OP, x, weights, rates)
    separable = [b for b, d in enumerate(depthwise) if not checks.is_none(d)]
    if separable:
        checks.check_separable(
            _OP,
            x,
            [depthwise[b] for b in separable],
            [weights[b] for b in separable],
            [r for b in separable for r in rates[2 * b : 2 * b + 2]],
        )
    checks.check_vector(_OP, "shift", shift, x, channels)
    if not ((pool_weight is None) == (pool_shift is None)):
        raise ValueError(f"{_OP}: pool_weight and pool_shift must be given together")
    pooled = 0
    if pool_weight is not None:
        checks.check_like(_OP, "pool_weight", pool_weight, x)
        if not (pool_weight.dim() == 2 and pool_weight.size(1) == x.size(1)):
            raise ValueError(
                f"{_OP}: pool_weight must be [Q, {x.size(1)}], got shape {list(pool_weight.shape)}"
            )
        pooled = pool_weight.size(0)
        checks.check_vector(_OP, "pool_shift", pool_shift, x, pooled)
    if not ((project_weight is None) == (project_shift is None)):
        raise ValueError(f"{_OP}: project_weight and project_shift must be given together")
    if project_weight is None and pool_weight is not None:
        raise ValueError(
            f"{_OP}: pool_weight and pool_shift must be None where project_weight is, got tensors"
        )
    if project_weight is not None:
        checks.check_like(_OP, "project_weight", project_weight, x)
        if not (
            project_weight.dim() == 2
            and project_weight.size(1) == channels + pooled
            and project_weight.size(0) >= 1
        ):
            raise ValueError(
                f"{_OP}: project_weight must be [P, {channels + pooled}], got shape "
                f"{list(project_weight.shape)}"
            )
        channels = project_weight.size(0)
        checks.check_vector(_OP, "project_shift", project_shift, x, channels, True)
    if prepared is not None and len(prepared) != len(weights):
        raise ValueError(
            f"{_OP}: prepared must be None or have one entry per branch, got {len(prepared)} for "
            f"{len(weights)} branches"
        )
    checks.check_polyphase(_OP, polyphase)
    return channels


def polyphase_weights(
    weights: Sequence[Tensor],
    atrous_rates: Sequence[Rate],
    height: int,
    width: int,
    *,
    polyphase: bool | Decided = True,
) -> list[Tensor]:
    """The weights of a pyramid as minimal filtering takes them: ``prepared`` of a head.

    They depend on the size of the maps and take several times the memory of the weights. Not to be
    traced: their shapes are the kernel's choice.

    Args:
        weights, atrous_rates, polyphase: as in :func:`aspp_inference`.
        height, width: H and W of x, at any N.

    Returns:
        Per branch a tensor, which is empty where the branch is computed directly.

    Raises:
        ValueError: shapes, kernel sizes, rates or list lengths that do not fit.
        TypeError: an argument that is no tensor, or of another dtype than the first weight, or no
            bool.
        NotImplementedError: a weight requires a gradient, or the call is traced.
    """
    checks.check_list(_WEIGHTS, "weights", weights)
    for b, w in enumerate(weights):
        checks.check_tensor(_WEIGHTS, f"weights[{b}]", w)
        checks.check_dtype(_WEIGHTS, f"weights[{b}]", w)
        checks.check_kernel(_WEIGHTS, f"weights[{b}]", w)
    rates = checks.flat_rates(_WEIGHTS, atrous_rates)
    checks.check_rates(_WEIGHTS, rates, len(weights))
    height = checks.check_int(_WEIGHTS, "height", height)
    width = checks.check_int(_WEIGHTS, "width", width)
    x = weights[0].new_empty((1,)).expand((1, weights[0].size(1), height, width))
    checks.check_dense(_WEIGHTS, x, weights, rates)
    if not isinstance(polyphase, Decided):
        checks.check_flag(_WEIGHTS, "polyphase", polyphase)
    wish = policy(polyphase)
    if _native.cpu_missing is not None:
        return [w.new_empty((0,)) for w in weights]
    return NATIVE.op(_WEIGHTS)(list(weights), rates, height, width, wish)


def _composed(*arguments: Any) -> Tensor:
    check_head(*arguments)
    return head_composed.aspp_inference(*arguments)


def _fake(x: Tensor, *rest: Any) -> Tensor:
    last = rest[10] if len(rest) > 10 else None
    return empty_image(x, check_head(x, *rest), [x], channels_last=last)


def _fake_weights(*_: Any) -> list[Tensor]:
    raise NotImplementedError(
        f"{_WEIGHTS}: the kernel chooses the shapes, so it cannot be traced; call it before tracing"
    )


if _native.cpu_missing is None:
    _op = torch.ops.aspp_ext.aspp_inference.default
    _weights_op = torch.ops.aspp_ext.polyphase_weights.default

    register_fake(_op, _fake)
    register_fake(_weights_op, _fake_weights)
    refuse_gradient(
        _weights_op,
        f"{_WEIGHTS}: computes no gradients but a weight requires one; call it under "
        "torch.no_grad()",
    )

    compose_gradient(_op, _composed)
    register_autocast(_op, kept="prepared")
    register_vmap(_op)
