# SPDX-License-Identifier: BSD-3-Clause
"""``checksums``: whether tensors still are what they were, whoever wrote to them and how."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native
from .registration import register_fake


def checksums(tensors: Sequence[Tensor]) -> Tensor:
    """64 bits of each tensor that change with any of its bytes, its sizes, strides or dtype.

    At the speed of memory. A change of one word of 8 bytes is never lost; several can undo each
    other by accident alone.

    Args:
        tensors: one or more on the CPU, of any dtype and memory format.

    Returns:
        int64 ``[len(tensors)]``.
    """
    with torch.no_grad():
        return torch.ops.aspp_ext.checksums(list(tensors))


def _fake(tensors: Sequence[Tensor]) -> Tensor:
    return torch.empty(len(tensors), dtype=torch.int64)


if _native.cpu_missing is None:
    register_fake(torch.ops.aspp_ext.checksums.default, _fake)
