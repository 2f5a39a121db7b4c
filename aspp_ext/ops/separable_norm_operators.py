# SPDX-License-Identifier: BSD-3-Clause
"""The operators that :mod:`aspp_ext.ops.separable_norm` is built of: checks, fakes, registration.

CUDA alone has kernels for them, and there are no Triton operators beside them: where those kernels
do not run, PyTorch's operators do the same. They have no gradients of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import _native
from .._autograd_key import refuse_gradient
from . import checks
from .family import NATIVE
from .formats import empty_image
from .registration import register_fake, register_vmap

OP = "atrous_separable_pyramid_batch_norm"
"""What their refusals call them all."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of sums, statistics and vectors of channels beside tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_statistics(x, depthwise, rates, store=False):
    checks.check_depthwise(OP, x, depthwise, rates)
    mean, squares = (
        x.new_empty((len(depthwise) * x.size(1),), dtype=wide(x.dtype)) for _ in range(2)
    )
    last = {"dtype": x.dtype, "device": x.device, "memory_format": torch.channels_last}
    stored = [torch.empty(x.shape, **last) for d in depthwise if d.numel() and store]
    return mean, squares, stored


def _check(x, depthwise, pointwise, rates, **vectors):
    channels = checks.check_separable(OP, x, depthwise, pointwise, rates)
    for name, v in vectors.items():
        checks.check_channel_vector(OP, name, v, x, len(depthwise), wide(x.dtype))
    return channels


def _fake(x, depthwise, pointwise, rates, scale, shift, relu, stored, tf32=False):
    channels = _check(x, depthwise, pointwise, rates, scale=scale, shift=shift)
    checks.check_stored(OP, stored, x, depthwise)
    return empty_image(x, channels, [x, *pointwise])


def _fake_sums(grad, x, depthwise, pointwise, rates, scale, shift, relu, tf32=False):
    channels = _check(x, depthwise, pointwise, rates, scale=scale, shift=shift)
    checks.check_grad(OP, grad, x, channels)
    return tuple(torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (scale, shift))


def _fake_backward(
    grad,
    x,
    depthwise,
    pointwise,
    rates,
    scale,
    shift,
    relu,
    a,
    b,
    need_x,
    need_depthwise,
    need_pointwise,
    tf32=False,
):
    channels = _check(x, depthwise, pointwise, rates, scale=scale, shift=shift)
    checks.check_grad(OP, grad, x, channels)
    for name, v in (("a", a), ("b", b)):
        checks.check_channel_vector(OP, name, v, x, len(depthwise), wide(x.dtype))

    def like(tensors, needed):
        return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors] * needed

    return (
        empty_image(x, x.size(1), [x]) if need_x else x.new_empty((0,)),
        like(depthwise, need_depthwise),
        like(pointwise, need_pointwise),
    )


FAKES: dict[str, Callable[..., Any]] = {
    "atrous_depthwise_statistics": _fake_statistics,
    "atrous_separable_norm": _fake,
    "atrous_separable_norm_sums": _fake_sums,
    "atrous_separable_norm_backward": _fake_backward,
}

if _native.cpu_missing is None:
    for _name, _fake_of in FAKES.items():
        _op = NATIVE.op(_name).default
        register_fake(_op, _fake_of)
        register_vmap(_op)
        refuse_gradient(_op, f"{_name}: it is a step of {OP}, which has the gradient; call that")
