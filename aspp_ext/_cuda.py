# SPDX-License-Identifier: BSD-3-Clause
"""Why the CUDA kernels cannot compute a problem.

Nothing here touches CUDA unless a tensor is on such a device and the library is loaded.
"""

from __future__ import annotations

from torch import Tensor

from . import _gpu, _native
from ._autograd_key import unavailable as autograd_unavailable


def why_not(x: Tensor, branches: int) -> str | None:
    """The reason against a pyramid of x ``[N, C, H, W]``, or None."""
    if (missing := _native.cuda_missing or autograd_unavailable) is not None:
        return missing
    if x.device.type != "cuda":
        return f"it runs on CUDA devices but x is on {x.device.type}"
    if (reason := _gpu.beyond_limits(x, branches)) is not None:
        return reason
    return _gpu.too_old(x.device)
