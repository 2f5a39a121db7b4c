# SPDX-License-Identifier: BSD-3-Clause
"""How CUDA computes a separable pyramid on a device: fused or through memory; and with a training
batch norm between, whether depthwise results are stored or computed again.

The planner decides (csrc/cuda/fused_choice.h); this file tells it of the device.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _gpu, _native
from .precision import allows_tf32

if TYPE_CHECKING:
    from .. import _plan

WAY = "ASPP_EXT_SEPARABLE"
"""Read when the package is imported; :func:`use_separable_way` changes what was read."""

way = os.environ.get(WAY, "")

EMULATED_SHARED_BYTES = 227 << 10
"""Shared memory of a block where csrc/cuda/emulation takes the device's place."""


def use_separable_way(asked: str) -> str:
    """Which way CUDA's separable forward takes from now on, on all threads.

    Args:
        asked: "fused", "stored", or "" for its own choice.

    Returns:
        What it was.
    """
    global way
    if _native.emulated or _native.cuda_missing is None:
        torch.ops.aspp_ext.separable_way(asked)
    before, way = way, asked
    return before


@contextlib.contextmanager
def separable_way(asked: str) -> Iterator[None]:
    """:func:`use_separable_way` inside."""
    before = use_separable_way(asked)
    try:
        yield
    finally:
        use_separable_way(before)


def fused_choice(
    x: Tensor, kernels: Sequence[tuple[int, int]], rates: Sequence[int], outs: Sequence[int]
) -> _plan.FusedChoice:
    """For x ``[N, C, H, W]``, N at least 1, on its device.

    Args:
        kernels: per branch the depthwise kernel's (kh, kw), (1, 1) for a plain branch.
        rates: (rate_h, rate_w) of every branch, flat.
        outs: per branch its output channels.

    Raises:
        ImportError: the planner was not built.
    """
    shared = _gpu.shared_bytes(x.device) if x.is_cuda else EMULATED_SHARED_BYTES
    math = "tf32" if allows_tf32(x) else str(x.dtype).removeprefix("torch.")
    n, c, h, w = (int(s) for s in x.shape)
    branches = tuple(
        (kernel, (rates[2 * b], rates[2 * b + 1]), outs[b]) for b, kernel in enumerate(kernels)
    )
    return _choose((n, c, h, w), branches, math, shared)


@functools.lru_cache(maxsize=256)
def _choose(
    shape: tuple[int, int, int, int],
    branches: tuple[tuple[tuple[int, int], tuple[int, int], int], ...],
    math: _plan.Math,
    shared: int,
) -> _plan.FusedChoice:
    from .. import _plan

    n, c, h, w = shape
    each = [_plan.Branch(kernel=k, rate=r, out_channels=o) for k, r, o in branches]
    return _plan.choose_fused(_plan.Problem(n, h, w, each, in_channels=c), math, shared)
