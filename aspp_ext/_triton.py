# SPDX-License-Identifier: BSD-3-Clause
"""Why the Triton kernels cannot compute a problem.

Importing this imports no Triton, and nothing here touches CUDA unless a tensor is on such a device.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re

import torch
from torch import Tensor

from . import _gpu, _native
from ._autograd_key import unavailable as autograd_unavailable

OLDEST = (3, 6)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What PyTorch's builds call the distribution that installs the module `triton`.
_DISTRIBUTIONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows")


def _version() -> str | None:
    """Of the Triton that can be imported; None without one."""
    if importlib.util.find_spec("triton") is None:
        return None
    for distribution in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


version: str | None = _version()


def _missing() -> str | None:
    if (reason := _native.cpu_missing or autograd_unavailable) is not None:
        return reason
    try:
        importlib.import_module("aspp_ext._plan")
    except ImportError as error:
        return f"the planner was not built ({error})"
    if version is None:
        return "Triton is not installed"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST:
        return f"it needs Triton {OLDEST[0]}.{OLDEST[1]} or newer, got {version}"
    return None


missing: str | None = _missing()
"""None where the kernels can be compiled, or interpreted."""


interpreted = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs its kernels in Python, which it decides when a kernel is defined."""


def only_for_tests() -> str | None:
    """The reason not to choose interpreted kernels unasked."""
    if not interpreted:
        return None
    return "Triton's interpreter is for tests; backend='triton' or ASPP_EXT_BACKEND=triton runs it"


def why_not(x: Tensor, branches: int) -> str | None:
    """The reason against a pyramid of x ``[N, C, H, W]``, or None."""
    if missing is not None:
        return missing
    device = x.device.type
    if device not in ("cuda", "cpu", "meta"):
        return f"it runs on GPUs but x is on {device}"
    if device != "cuda" and not interpreted:
        return (
            f"it runs on GPUs; x is on {device}, where only Triton's interpreter does "
            "(TRITON_INTERPRET=1)"
        )
    if x.dtype not in DTYPES:
        return f"dtypes are float32, bfloat16 and float16, got {str(x.dtype).split('.')[1]}"
    if (reason := _gpu.beyond_limits(x, branches)) is not None:
        return reason
    return _gpu.too_old(x.device) if device == "cuda" else None


def refusal(x: Tensor, branches: int) -> str | None:
    """What an operator that is called by its own name cannot do, or None."""
    if missing is None and x.device.type == "cpu" and not interpreted:
        return "Triton computes on GPUs; on the CPU only its interpreter does (TRITON_INTERPRET=1)"
    return why_not(x, branches)
