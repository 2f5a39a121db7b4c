# SPDX-License-Identifier: BSD-3-Clause
"""The fused forward of an ASPP module, as a class to be mixed in before the module's own.

``class FusedASPP(FusedForward, ASPP)`` computes what ``ASPP`` does from the same submodules. An
instance of ``ASPP`` becomes fused by assigning ``__class__`` and stays the same object with the
same parameters, buffers, keys and hooks; nothing is added to its state.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from aspp_ext.ops import aspp_inference
from aspp_ext.ops.formats import is_channels_last
from aspp_ext.ops.registration import is_autocast_on

from .fold import FoldCache, Folded, cacheable, fold, sources
from .head import Head, forward_layers
from .parts import Unfusable

_CACHE = "_aspp_ext_folded"
SETTINGS = ("pool_batch_of_one", "polyphase")


class FusedForward(nn.Module):
    """Mix-in with the fused forward; the class after it in the bases is the unfused original.

    Attributes:
        original: the class that this one was made from.
        pool_batch_of_one: what training does when the pooled branch has one value per channel:
            "error" (as PyTorch) or "running_stats" (normalise that branch with its running
            statistics, which stay as they are).
        polyphase: whether the CPU may compute dense branches by minimal filtering, for which the
            folded copy keeps prepared weights, several times the memory of the branches' own.
    """

    original: ClassVar[type[nn.Module]]
    pool_batch_of_one: str = "error"
    polyphase: bool = True

    @classmethod
    def describe(cls, module: nn.Module) -> Head:
        """Read the parts of ``module``.

        Raises:
            Unfusable: naming the part that the fused path does not compute.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Compute the ASPP of ``x`` [N, C, H, W] -> [N, P, H, W]."""
        if not isinstance(x, Tensor) or _needs_plain_operators():
            return super().forward(x)
        try:
            head = self.describe(self)
        except Unfusable:
            return super().forward(x)
        channels = head.pool.weight.shape[1]
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(
                f"{type(self).__name__}: x must be [N, {channels}, H, W], got {list(x.shape)}"
            )
        if _wants_gradient(head, x) or any(
            norm.training or norm.running_mean is None for norm in head.norms()
        ):
            return forward_layers(head, x, self.pool_batch_of_one, self.polyphase)
        weight = head.project.weight  # [P, K, 1, 1]
        dtype = weight.dtype
        if dtype != torch.float64 and is_autocast_on(x):
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
        folded, prepared = self._folded(head, x, dtype)
        y = aspp_inference(x, *folded, polyphase=self.polyphase, prepared=prepared)
        if is_channels_last(weight):
            y = y.contiguous(memory_format=torch.channels_last)
        return head.dropout(y)

    def _folded(
        self, head: Head, x: Tensor, dtype: torch.dtype
    ) -> tuple[Folded, list[Tensor] | None]:
        """The folded head and its weights prepared for x, None where no copy is kept."""
        cache = None if _is_traced() else self._cache(head, dtype)
        if cache is None:
            with torch.no_grad():
                return fold(head, dtype), None
        by_cpu = self.polyphase and x.device.type == "cpu" and x.dim() == 4
        return cache.folded, cache.prepared(*x.shape[-2:]) if by_cpu else None

    def _cache(self, head: Head, dtype: torch.dtype) -> FoldCache | None:
        cache = self.__dict__.get(_CACHE)
        if cache is not None and cache.holds(head, dtype):
            return cache
        if not cacheable(head):
            return None
        # Outside inference mode, so that the copy can be used outside of it later.
        with torch.inference_mode(False), torch.no_grad():
            cache = FoldCache(head, dtype)
        if cache.sources[0].is_cuda:
            # Another thread may read the copy on another stream.
            torch.cuda.current_stream(cache.sources[0].device).synchronize()
        self.__dict__[_CACHE] = cache
        return cache

    def drop_folded(self) -> None:
        """Forget the folded weights; the next inference folds again."""
        self.__dict__.pop(_CACHE, None)

    def train(self, mode: bool = True) -> FusedForward:
        """Set the training mode and forget the folded weights."""
        self.drop_folded()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> FusedForward:
        self.drop_folded()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != _CACHE}

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript compiles the original forward over the same parameters."""
        plain: nn.Module = copy.copy(self)
        plain.__class__ = self.original
        return plain


def _needs_plain_operators() -> bool:
    """Whether something looks at the graph that knows only PyTorch's own operators."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return torch.onnx.is_in_onnx_export()
    return torch._C._functorch.peek_interpreter_stack() is not None


def _is_traced() -> bool:
    """Whether a graph is being recorded, in which the fold must depend on the parameters."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return _get_current_dispatch_mode() is not None


def _wants_gradient(head: Head, x: Tensor) -> bool:
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(t.requires_grad for t in sources(head))
