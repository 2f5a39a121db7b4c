# SPDX-License-Identifier: BSD-3-Clause
"""The GPU that a tensor is on, as far as it decides which kernels compute it.

Nothing here touches CUDA unless it is given such a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_BRANCHES = 64
"""Branches of one launch (csrc/cuda/params.h)."""

MAX_PIXELS = 2**31 - 2**10
"""Pixels of the batch: work lists (csrc/plan/work_list.h) and kernels count them in 32 bits, to the
end of the last tile."""

MIN_CAPABILITY = (8, 0)


def has_device() -> bool:
    """False for fake tensors on a machine without one, where a program is made for another."""
    return torch.cuda.is_available()


def capability(device: torch.device) -> tuple[int, int]:
    # get_device_capability would leave a call in the graph that torch.compile traces.
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


def shared_bytes(device: torch.device) -> int:
    """Shared memory that a block may have."""
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined]


def amd_architecture(device: torch.device) -> str:
    """With what it can switch on and off, like "gfx942:sramecc+:xnack-"."""
    return torch.cuda.get_device_properties(device).gcnArchName


def architecture(device: torch.device) -> str:
    """The device's, like "sm_90" or, where PyTorch was built for ROCm, "gfx942"."""
    if torch.version.hip is not None:
        return amd_architecture(device).split(":")[0]
    major, minor = capability(device)
    return f"sm_{major}{minor}"


def beyond_limits(x: Tensor, branches: int) -> str | None:
    """The reason against a pyramid of x ``[N, C, H, W]`` that is too large for work lists."""
    if branches > MAX_BRANCHES:
        return f"branches go up to {MAX_BRANCHES}, got {branches}"
    pixels = x.size(0) * x.size(2) * x.size(3)
    if pixels > MAX_PIXELS:
        return f"pixels of the batch go up to {MAX_PIXELS}, got {pixels}"
    return None


def too_old(device: torch.device) -> str | None:
    """The reason against a device without the instructions of sm_80; AMD's are not asked."""
    if not has_device():
        return "there is no CUDA device to ask for its compute capability"
    if torch.version.hip is not None:
        return None
    major, minor = capability(device)
    if (major, minor) < MIN_CAPABILITY:
        return f"it needs compute capability 8.0, the device has {major}.{minor}"
    return None
