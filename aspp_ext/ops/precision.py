# SPDX-License-Identifier: BSD-3-Clause
"""Whether float32 products may be rounded to TF32: where PyTorch's own convolution would do it.

PyTorch has an old switch, ``torch.backends.cudnn.allow_tf32``, and since 2.9 a precision per
backend and operation, ``torch.backends.cudnn.conv.fp32_precision``, which inherits from
``torch.backends.cudnn.fp32_precision`` and ``torch.backends.fp32_precision``. The old one writes
into the new one, and convolutions read the new one alone. So does this file: the old one raises
when both have been used.
"""

from __future__ import annotations

import types

import torch
from torch import Tensor


class _Switches(types.ModuleType):
    """A module, because ``torch.compile`` guards what it reads from one: a graph that was traced
    under another setting is compiled anew. Of PyTorch's own attribute it keeps no guard."""

    @property
    def convolution(self) -> bool:
        conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        return conv.fp32_precision == "tf32"


switches = _Switches(f"{__name__}.switches")


def allows_tf32(x: Tensor) -> bool:
    """Whether PyTorch's switches allow TF32 for convolutions of x: float32 on a CUDA device."""
    return x.dtype == torch.float32 and x.device.type == "cuda" and switches.convolution
