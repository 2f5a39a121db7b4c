# SPDX-License-Identifier: BSD-3-Clause
"""``aspp_inference``: the whole head with its normalisations folded, in one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._autograd_key import refuse_gradient
from ..dispatch import Problem, select
from . import checks
from .checks import Rate
from .formats import empty_image
from .registration import library, register_autocast, register_vmap, under_autocast

_OP = "aspp_inference"


def aspp_inference(
    x: Tensor,
    depthwise_weights: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    atrous_rates: Sequence[Rate],
    shift: Tensor,
    pool_weight: Tensor | None,
    pool_shift: Tensor | None,
    project_weight: Tensor,
    project_shift: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Atrous Spatial Pyramid Pooling for inference (DeepLab v3, arXiv 1706.05587, section 3.3).

    ``y = relu(W_proj cat_b[relu(branch_b(x) + shift_b), relu(W_pool mean(x) + pool_shift)] +
    project_shift)``. The pooled branch is constant over the plane, so its part of the projection is
    a per-sample bias and is never spread over ``H x W``. Batch normalisation is expected to be
    folded into weights and shifts. Weights whose memory has stride 1 over the output channels (on
    CUDA: over the input channels) are read in place; any other format is packed on each call.

    Args:
        x: ``[N, C, H, W]``; any memory format.
        depthwise_weights: per branch ``[C, 1, kh, kw]`` or None (a dense branch).
        weights: per branch ``[O_b, C, kh, kw]`` when dense, ``[O_b, C, 1, 1]`` when separable.
        atrous_rates: per branch an int or ``(rate_h, rate_w)``, at least 1.
        shift: ``[sum O]``.
        pool_weight, pool_shift: ``[Q, C]`` and ``[Q]``, or both None: no image pooling.
        project_weight: ``[P, sum O + Q]``, the pooled columns last.
        project_shift: ``[P]``.
        backend: force an implementation; None takes the first that can.

    Returns:
        ``[N, P, H, W]`` in x's memory format.

    Raises:
        ValueError: shapes, kernel sizes, rates or list lengths that do not fit, or an unknown
            backend.
        TypeError: an argument that is no tensor, or of another dtype than x.
        NotImplementedError: a gradient of the CPU's kernel is needed; the differentiable operators
            compute those.
    """
    checks.check_tensor(_OP, "x", x)
    checks.check_list(_OP, "depthwise_weights", depthwise_weights)
    checks.check_list(_OP, "weights", weights)
    named: list[tuple[str, Any]] = [(f"weights[{b}]", w) for b, w in enumerate(weights)]
    named += [
        (f"depthwise_weights[{b}]", d) for b, d in enumerate(depthwise_weights) if d is not None
    ]
    named += [
        ("shift", shift),
        ("project_weight", project_weight),
        ("project_shift", project_shift),
    ]
    for name, value in named:
        checks.check_tensor(_OP, name, value)
    if pool_weight is not None:
        checks.check_tensor(_OP, "pool_weight", pool_weight)
    rates = checks.flat_rates(_OP, atrous_rates)
    depthwise = [x.new_empty(0) if d is None else d for d in depthwise_weights]
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
    project_weight: Tensor,
    project_shift: Tensor,
) -> int:
    """Checks the head; returns its number of output channels."""
    if not (len(depthwise) == len(weights)):
        raise ValueError(
            f"{_OP}: depthwise_weights must have one entry per branch, got {len(depthwise)} for "
            f"{len(weights)} branches"
        )
    channels = checks.check_dense(_OP, x, weights, rates)
    separable = [b for b, d in enumerate(depthwise) if d.numel() > 0]
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
    checks.check_vector(_OP, "project_shift", project_shift, x, project_weight.size(0))
    return project_weight.size(0)


if _native.cpu_missing is None:
    _op = torch.ops.aspp_ext.aspp_inference.default

    @torch.library.register_fake("aspp_ext::aspp_inference")
    def _(*arguments):
        return empty_image(arguments[0], check_head(*arguments), [arguments[0]])

    refuse_gradient(
        library,
        _op,
        f"{_OP}: computes no gradients but an argument requires one; call it under "
        "torch.no_grad(), or use atrous_pyramid / atrous_separable_pyramid",
    )
    register_autocast(_op)
    register_vmap(_op)
