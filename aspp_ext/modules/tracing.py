# SPDX-License-Identifier: BSD-3-Clause
"""Who else is looking: what a module may do depends on whether its calls are recorded."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from aspp_ext.ops.registration import is_batched


def is_traced() -> bool:
    """Whether the compiler or TorchScript records a graph."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def may_be_traced() -> bool:
    """Whether anybody may be recording one, in which the fold must depend on the parameters: a
    dispatch mode may also only count."""
    return is_traced() or _get_current_dispatch_mode() is not None


def is_transformed(t: Tensor) -> bool:
    """Whether operators that have no rule for it would see something else than a tensor's values:
    within function transforms, batched gradients, and tensors that dispatch on their own."""
    if torch._C._functorch.peek_interpreter_stack() is not None or is_batched(t):
        return True
    return type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__


def in_forward_mode() -> bool:
    """Whether derivatives are carried along, which only PyTorch's own operators have."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0
