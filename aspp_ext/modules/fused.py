# SPDX-License-Identifier: BSD-3-Clause
"""The fused forward of an ASPP module, as a class to be mixed in before the module's own.

``class FusedASPP(FusedForward, ASPP)`` computes what ``ASPP`` does from the same submodules. An
instance of ``ASPP`` becomes fused by assigning ``__class__`` and stays the same object with the
same parameters, buffers, keys and hooks; nothing is added to its state.
"""

from __future__ import annotations

import functools
import types
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from aspp_ext.ops.checks import check_tensor, dtype_name
from aspp_ext.ops.polyphase_choice import NEVER, Decided, policy
from aspp_ext.ops.registration import is_autocast_on, under_autocast

from .fold_cache import FoldCache, can_keep, sources
from .folded import fold
from .head import Head
from .inference import foldable, infer
from .layers import forward_layers
from .meaning import gives_meaning
from .parts import Unfusable, check_classes, check_tensors
from .prepared import Prepared
from .tracing import in_forward_mode, may_be_traced
from .untouched import changed_methods

# What is ours in an instance, beside attributes that may be the user's.
CACHE, FROZEN, PROGRAM = "_aspp_ext_folded", "_aspp_ext_frozen", "_aspp_ext_program"
SETTINGS = ("pool_batch_of_one", "polyphase", FROZEN)


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
    pool_batch_of_one = "error"
    polyphase = True

    @classmethod
    def describe(cls, module: nn.Module) -> Head:
        """Read the parts of ``module``.

        Raises:
            Unfusable: naming the part that the fused path does not compute.
        """
        raise NotImplementedError

    @classmethod
    def read(cls, module: nn.Module) -> Head:
        """:func:`describe`, of a module that computes what its class was written to.

        Its own ``forward`` may be wrapped, as accelerate's hooks do: then the wrapper calls.

        Raises:
            Unfusable: in words.
        """
        check_classes(cls.original)
        if names := [name for name in changed_methods(module) if name != "forward"]:
            raise Unfusable(f"its {names[0]} is replaced")
        try:
            return cls.describe(module)
        except (AttributeError, TypeError, ValueError, IndexError) as error:
            # PyTorch reads other things of a layer, an int where we expect a pair for instance.
            raise Unfusable(f"it cannot be read: {error}") from error

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "original" in vars(cls):
            cls.forward = forward_like(cls.original)

    def compute(self, x: Tensor) -> Tensor:
        """The forward: the ASPP of ``x`` [N, C, H, W] -> [N, P, H, W]."""
        if not isinstance(x, Tensor) or gives_meaning(type(x)) or needs_plain_operators():
            return super().forward(x)
        traced = may_be_traced()
        if not traced and (frozen := self._frozen_copy(x)) is not None:
            return self._infer(*frozen, x)
        try:
            head = type(self).read(self)  # an instance may have attributes of any name
            layers, cache = self._way(head, x, traced)
        except Unfusable:
            return super().forward(x)
        _check_features(self, head, x)
        if layers:
            y = forward_layers(head, x, self.pool_batch_of_one, self.polyphase)
            assert isinstance(y, Tensor)  # what has a name joins its branches
            return y
        return self._infer(head, cache, x)

    def _way(
        self, head: Head, x: Tensor, traced: bool, slot: str = CACHE
    ) -> tuple[bool, FoldCache | None]:
        """Whether the head is computed with gradients or by its norms' own rules, and else its
        folded copy, if one is kept; raises Unfusable."""
        # A trace serves calls with and without gradients.
        differentiable = not torch.jit.is_tracing() and _wants_gradient(head, x)
        layers = differentiable or _trains(head) or not foldable(head)
        cache = None if traced or layers else self._cache(head, dtype_of(head, x), slot)
        if cache is None:
            check_tensors(head)
        return layers or (cache is not None and not cache.in_range), cache

    def _infer(self, head: Head, cache: FoldCache | None, x: Tensor) -> Any:
        way: bool | Decided = self.polyphase
        (x,) = under_autocast(x)
        if cache is None:
            return infer(head, fold(head, dtype_of(head, x)), x, way, Prepared())
        prepared = Prepared()
        if isinstance(way, bool):
            way = Decided(policy(way))
        if way != NEVER and x.device.type == "cpu" and x.numel():
            prepared = cache.prepare(x.shape[-2], x.shape[-1], way)
        return infer(head, cache.folded, x, way, prepared)

    def _frozen_copy(self, x: Tensor, slot: str = CACHE) -> tuple[Head, FoldCache] | None:
        """What is used without a look at what it was made of."""
        cache = self.__dict__.get(slot)
        if cache is None or cache.head is None or self.training or not cache.in_range:
            return None
        if torch.is_grad_enabled() or in_forward_mode():
            return None
        if cache.dtype != dtype_of(cache.head, x) or cache.device != x.device:
            return None
        _check_features(self, cache.head, x)
        return cache.head, cache

    def _cache(self, head: Head, dtype: torch.dtype, slot: str) -> FoldCache | None:
        cache = self.__dict__.get(slot)
        if cache is not None and cache.holds(head, dtype):
            return cache
        frozen = bool(self.__dict__.get(FROZEN))
        if not can_keep(head, frozen=frozen):
            return None
        check_tensors(head)
        # Outside inference mode, so that the copy can be used outside of it later.
        with torch.inference_mode(False), torch.no_grad():
            cache = FoldCache(head, dtype, frozen=frozen)
        if head.weight.is_cuda:
            # Another thread may read the copy on another stream.
            torch.cuda.current_stream(head.weight.device).synchronize()
        self.__dict__[slot] = cache
        return cache

    def folded_copies(self) -> list[FoldCache]:
        """What is kept of earlier calls."""
        return [value for key, value in vars(self).items() if key.startswith(CACHE)]

    def _kept_bytes(self) -> int:
        """Memory of the weights that are prepared for minimal filtering."""
        return sum(cache.prepared_bytes for cache in self.folded_copies())

    def drop_folded(self) -> None:
        """Forget the folded weights; the next inference folds again."""
        for key in [key for key in vars(self) if key.startswith(CACHE)]:
            del self.__dict__[key]

    def train(self, mode: bool = True) -> FusedForward:
        """Set the training mode and forget the folded weights."""
        self.drop_folded()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> FusedForward:
        self.drop_folded()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if not key.startswith(CACHE)}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.drop_folded()
        super()._load_from_state_dict(*args, **kwargs)


def forward_like(original: type[nn.Module]) -> Any:
    """``forward`` of a fused class, for TorchScript the original's.

    TorchScript compiles the source that ``__wrapped__`` leads to, with the names that the function
    sees.
    """

    plain = original.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        compute = getattr(type(self), "compute", None)
        if compute is None:  # unfused, under a wrapper that has kept this
            return plain(self, *args, **kwargs)
        return compute(self, *args, **kwargs)

    ours = types.FunctionType(
        forward.__code__, plain.__globals__, "forward", None, forward.__closure__
    )
    return functools.wraps(plain)(ours)


def needs_plain_operators() -> bool:
    """Whether something looks at the graph that knows only PyTorch's own operators."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return torch.onnx.is_in_onnx_export()
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    # A mode may give what the layers call another meaning; PyTorch's own, of devices and of export,
    # do not.
    modes = (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack())
    return not all(type(mode).__module__.startswith("torch.") for mode in modes)


def _trains(head: Head) -> bool:
    """Whether a norm has to see the batch, or has nothing to be folded."""
    return any(
        norm.training or norm.running_mean is None or norm.running_var is None
        for norm in head.folded_norms()
    )


def dtype_of(head: Head, x: Tensor) -> torch.dtype:
    """What is computed in, which autocast may change."""
    dtype = head.weight.dtype
    if dtype != torch.float64 and is_autocast_on(x):
        return torch.get_autocast_dtype(x.device.type)
    return dtype


def _check_features(module: nn.Module, head: Head, x: Tensor) -> None:
    name, channels = type(module).__name__, head.channels
    check_tensor(name, "x", x)
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"{name}: x must be [N, {channels}, H, W], got {list(x.shape)}")
    dtype, given = dtype_of(head, x), x.dtype
    if given.is_floating_point and given != torch.float64 and is_autocast_on(x):
        given = torch.get_autocast_dtype(x.device.type)
    if given != dtype:
        rule = f"x must be {dtype_name(dtype)}, in which it computes"
        raise TypeError(f"{name}: {rule}, got {dtype_name(x.dtype)}")


def _wants_gradient(head: Head, x: Tensor) -> bool:
    if in_forward_mode():
        return True
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(t.requires_grad for t in sources(head))
