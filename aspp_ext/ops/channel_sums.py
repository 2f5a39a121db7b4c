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


def _fake_statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty((y.shape[1],)), y.new_empty((y.shape[1],))


def _fake_sums(grad: Tensor, y: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_statistics(y)


if _native.cpu_missing is None:
    register_fake(torch.ops.aspp_ext.channel_statistics.default, _fake_statistics)
    register_fake(torch.ops.aspp_ext.channel_sums.default, _fake_sums)
