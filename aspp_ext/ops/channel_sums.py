# SPDX-License-Identifier: BSD-3-Clause
"""The sums over pixels behind a batch norm, on the CPU.

PyTorch's batch norm of channels_last maps adds up all pixels in one chain per channel. On maps with
constant stretches, as padded and masked images have, that loses three digits that it keeps on
contiguous ones; these chains are short.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from . import checks
from .registration import register_fake


def channel_statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over N, H and W, and the sum of squared differences from it: constants to autograd.

    Args:
        y: ``[N, C, H, W]`` on the CPU, channels_last, in float32 or float64.

    Returns:
        Two ``[C]`` in y's dtype.
    """
    with torch.no_grad():
        return torch.ops.aspp_ext.channel_statistics(y)


def channel_sums(grad: Tensor, y: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """``sum(grad)`` and ``sum(grad * (y - mean))`` over N, H and W.

    Args:
        grad, y: ``[N, C, H, W]`` as for :func:`channel_statistics`.
        mean: ``[C]``.

    Returns:
        Two ``[C]`` in y's dtype.
    """
    with torch.no_grad():
        return torch.ops.aspp_ext.channel_sums(grad, y, mean)


def channel_gradient(
    grad: Tensor,
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    scale: Tensor,
    total: Tensor,
    product: Tensor,
) -> Tensor:
    """``(grad - total / M - (y - mean) * invstd^2 * product / M) * scale``, M = N * H * W: the
    gradient of y through a batch norm by its own statistics (Ioffe and Szegedy, Batch
    Normalization, 2015).

    Args:
        grad, y: ``[N, C, H, W]`` as for :func:`channel_statistics`.
        mean, invstd: ``[C]``, of y.
        scale: ``[C]``, ``invstd * weight``.
        total, product: what :func:`channel_sums` returns.

    Returns:
        ``[N, C, H, W]``, channels_last.
    """
    with torch.no_grad():
        return torch.ops.aspp_ext.channel_gradient(grad, y, mean, invstd, scale, total, product)


def _check(op: str, grad: Tensor, y: Tensor, **vectors: Tensor) -> None:
    checks.check_like(op, "grad", grad, y)
    for name, vector in vectors.items():
        checks.check_vector(op, name, vector, y, y.shape[1])


def _fake_statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty((y.shape[1],)), y.new_empty((y.shape[1],))


def _fake_sums(grad: Tensor, y: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    _check("channel_sums", grad, y, mean=mean)
    return _fake_statistics(y)


def _fake_gradient(
    grad: Tensor,
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    scale: Tensor,
    total: Tensor,
    product: Tensor,
) -> Tensor:
    vectors = {"mean": mean, "invstd": invstd, "scale": scale, "total": total, "product": product}
    _check("channel_gradient", grad, y, **vectors)
    return torch.empty_like(y, memory_format=torch.channels_last)


if _native.cpu_missing is None:
    register_fake(torch.ops.aspp_ext.channel_statistics.default, _fake_statistics)
    register_fake(torch.ops.aspp_ext.channel_sums.default, _fake_sums)
    register_fake(torch.ops.aspp_ext.channel_gradient.default, _fake_gradient)
