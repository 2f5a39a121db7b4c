# SPDX-License-Identifier: BSD-3-Clause
"""Why the CUDA kernels cannot, or by default do not, compute a problem.

Nothing here touches CUDA unless a tensor is on such a device and the library is loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native, verified
from ._autograd_key import unavailable as autograd_unavailable

MAX_BRANCHES = 64
"""Branches of one launch (csrc/cuda/params.h)."""

MAX_PIXELS = 2**31 - 1
"""Pixels of the batch: work lists count them in 32 bits (csrc/cuda/work_list.h)."""

MIN_CAPABILITY = (8, 0)


def has_device() -> bool:
    """False for fake tensors on a machine without one, where a program is made for another."""
    return torch.cuda.is_available()


def capability(device: torch.device) -> tuple[int, int]:
    # get_device_capability would leave a call in the graph that torch.compile traces.
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


def architecture(device: torch.device) -> str:
    """The device's, like "sm_90"."""
    major, minor = capability(device)
    return f"sm_{major}{minor}"


def why_not(x: Tensor, branches: int) -> str | None:
    """The reason against a dense pyramid of x ``[N, C, H, W]``, or None."""
    if (missing := _native.cuda_missing or autograd_unavailable) is not None:
        return missing
    if x.device.type != "cuda":
        return f"it runs on CUDA devices but x is on {x.device.type}"
    if branches > MAX_BRANCHES:
        return f"branches go up to {MAX_BRANCHES}, got {branches}"
    pixels = x.size(0) * x.size(2) * x.size(3)
    if pixels > MAX_PIXELS:
        return f"pixels of the batch go up to {MAX_PIXELS}, got {pixels}"
    if not has_device():
        return "there is no CUDA device to ask for its compute capability"
    major, minor = capability(x.device)
    if (major, minor) < MIN_CAPABILITY:
        return f"it needs compute capability 8.0, the device has {major}.{minor}"
    return None


def unproven(device: torch.device) -> str | None:
    """The reason not to choose the kernels there unasked, or None."""
    name = architecture(device)
    if ("cuda", name) in verified.VERIFIED:
        return None
    return (
        f"no committed result verifies the CUDA kernels on {name} yet; backend='cuda' or "
        "ASPP_EXT_BACKEND=cuda runs them anyway"
    )
