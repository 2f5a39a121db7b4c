# SPDX-License-Identifier: BSD-3-Clause
"""``atrous_pyramid_statistics``: the dense pyramid and what a training batch norm needs of it.

The kernels have the result in registers when they write it, so they sum it up there; PyTorch's
batch norm reads it once more for that. This is a step of the modules, no public function.
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
from .family import FAMILIES, Family
from .formats import empty_image
from .polyphase_choice import BY_COST, policy
from .precision import allows_tf32
from .pyramid import AtrousPyramid
from .registration import (
    register_autocast,
    register_fake,
    register_vmap,
    under_autocast,
)
from .sibling import define_sibling

_OP = "atrous_pyramid"


def atrous_pyramid_statistics(
    x: Tensor, weights: Sequence[Tensor], atrous_rates: Sequence[Rate], *, polyphase: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``y = atrous_pyramid(x, weights, atrous_rates)`` with its statistics per channel.

    ``mean`` and ``squares = sum((y - mean)^2)`` are over N, H and W of y as it was rounded, in
    float32, or float64 for a float64 x. They are constants to autograd: the gradient of a batch
    norm's formula accounts for what depends on y through them.

    Args:
        x: ``[N, C, H, W]``, N at least 1.
        weights, atrous_rates, polyphase: as in :func:`aspp_ext.atrous_pyramid`.

    Returns:
        y ``[N, sum O, H, W]``, mean ``[sum O]`` and squares ``[sum O]``; None and None where the
        implementation that runs has no statistics to give.

    Raises:
        ValueError, TypeError: as :func:`aspp_ext.atrous_pyramid`.
    """
    rates = checks.flat_rates(_OP, atrous_rates)
    x, weights = under_autocast(x, list(weights))
    checks.check_dense(_OP, x, weights, rates)
    implementation = select(Problem(_OP, x, tuple(weights)))
    tf32 = allows_tf32(x)
    if implementation.statistics is None:
        y = implementation.call(x, weights, rates, None, None, False, tf32, policy(polyphase))
        return y, None, None
    return implementation.statistics(x, weights, rates, tf32)


_backward = AtrousPyramid.backward  # by the class, the compiler takes it for its own Function's


class AtrousPyramidStatistics:
    """The gradient of y, which is :class:`AtrousPyramid`'s; the statistics have none.

    Inputs: ``(rates, tf32, polyphase, x, *weights)``; where there are statistics polyphase has no
    effect.
    """

    @staticmethod
    def pack(
        x: Tensor, weights: Sequence[Tensor], rates: list[int], tf32: bool = False
    ) -> tuple[Any, ...]:
        return (rates, tf32, BY_COST, x, *weights)

    @staticmethod
    def call(
        op: Any, rates: list[int], tf32: bool, _polyphase: int, x: Tensor, *weights: Tensor
    ) -> Any:
        return tuple(op(x, list(weights), rates, tf32))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        AtrousPyramid.setup_context(ctx, inputs, outputs[0])
        ctx.mark_non_differentiable(*outputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_statistics: Any) -> Any:
        return _backward(ctx, grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return AtrousPyramid.jvp(ctx, *tangents), None, None


def _check(x, weights, rates, tf32=False):
    channels = checks.check_dense(_OP, x, weights, rates)
    if x.size(0) == 0:
        raise ValueError(f"{_OP}: statistics need at least one sample, got a batch of 0")
    return channels


def _fake(x, weights, rates, tf32=False):
    channels = _check(x, weights, rates)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, squares = (x.new_empty((channels,), dtype=wide) for _ in range(2))
    return empty_image(x, channels, [x, *weights]), mean, squares


def _register(family: Family) -> None:
    op = family.op("atrous_pyramid_statistics").default
    register_fake(op, _fake)
    register(op, AtrousPyramidStatistics, family, check=_check)
    register_autocast(op)
    register_vmap(op)


if _native.cpu_missing is None:
    define_sibling("atrous_pyramid_statistics", _check)
    for _family in FAMILIES:
        _register(_family)
