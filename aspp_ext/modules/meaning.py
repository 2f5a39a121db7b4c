# SPDX-License-Identifier: BSD-3-Clause
"""Whether a subclass of Tensor computes what tensors do: images on a sphere convolve otherwise, and
quantized weights are not what they seem. The fused path calls other functions than the layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .untouched import known_when_compiling

# Those that carry something along, and those that record.
_CARRYING = ("torchvision.", "monai.", "fastai.")
_RECORDING = ("torch._subclasses.", "torch._functorch.", "torch.fx.", "torch.testing.")
_PLAIN = ("torch.", "torch._C.", "torch._tensor.", "torch.nn.parameter.")
# Nested tensors go on, to be refused in our words; the layers' are about something else.
_REFUSED = ("torch.nested.",)
_DISABLED = (torch._C._disabled_torch_function_impl, torch._C._disabled_torch_dispatch_impl)


@known_when_compiling
def gives_meaning(kind: type[Tensor]) -> bool:
    """Whether a class of tensors may give the functions and operators that layers call another
    meaning, as modes do."""
    if kind in (Tensor, nn.Parameter):
        return False
    for name in ("__torch_function__", "__torch_dispatch__"):
        owner = next(base for base in kind.__mro__ if name in vars(base))
        home = f"{owner.__module__}."
        harmless = home in _PLAIN or home.startswith((*_CARRYING, *_RECORDING, *_REFUSED))
        if not harmless and getattr(kind, name) not in _DISABLED:
            return True
    return False
