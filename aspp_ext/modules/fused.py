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


class FusedModule(nn.Module):
    """What is common to the fused classes, which are this, mixed in before the original.

    Its names are few, as it stands before a class that may have names of its own.

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

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "original" in vars(cls):
            cls.forward = forward_like(cls.original)

    def folded_copies(self) -> list[FoldCache]:
        """What is kept of earlier calls."""
        return [value for key, value in vars(self).items() if key.startswith(CACHE)]

    def drop_folded(self) -> None:
        """Forget the folded weights; the next inference folds again."""
        for key in [key for key in vars(self) if key.startswith(CACHE)]:
            del self.__dict__[key]

    def train(self, mode: bool = True) -> FusedModule:
        """Set the training mode and forget the folded weights."""
        self.drop_folded()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> FusedModule:
        self.drop_folded()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        own = next(filter(_has_state, type(self).__mro__), None)
        state = vars(self) if own is None else own.__getstate__(self)  # type: ignore[attr-defined]
        return {key: value for key, value in state.items() if not key.startswith(CACHE)}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.drop_folded()
        super()._load_from_state_dict(*args, **kwargs)


class FusedForward(FusedModule):
    """Mix-in with the fused forward of a class that is known; that class comes after it."""

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

    def fused_forward(self, x: Tensor) -> Tensor:
        """The forward: the ASPP of ``x`` [N, C, H, W] -> [N, P, H, W]."""
        if not isinstance(x, Tensor) or gives_meaning(type(x)) or needs_plain_operators():
            return super().forward(x)
        traced = may_be_traced()
        if not traced and (frozen := frozen_copy(self, x)) is not None:
            return infer_folded(self, *frozen, x)
        try:
            head = type(self).read(self)  # an instance may have attributes of any name
            layers, cache = way(self, head, x, traced)
        except Unfusable:
            return super().forward(x)
        _check_features(self, head, x)
        if layers:
            y = forward_layers(head, x, self.pool_batch_of_one, self.polyphase)
            assert isinstance(y, Tensor)  # what has a name joins its branches
            return y
        return infer_folded(self, head, cache, x)


def way(
    module: FusedModule, head: Head, x: Tensor, traced: bool, slot: str = CACHE
) -> tuple[bool, FoldCache | None]:
    """Whether the head is computed with gradients or by its norms' own rules, and else its folded
    copy, if one is kept; raises Unfusable."""
    # A trace serves calls with and without gradients.
    differentiable = not torch.jit.is_tracing() and _wants_gradient(head, x)
    layers = differentiable or _trains(head) or not foldable(head)
    cache = None if traced or layers else _cache(module, head, dtype_of(head, x), slot)
    if cache is None:
        check_tensors(head)
    return layers or (cache is not None and not cache.in_range), cache


def infer_folded(module: FusedModule, head: Head, cache: FoldCache | None, x: Tensor) -> Any:
    """The head of x, without gradients, by the folded copy if there is one."""
    chosen: bool | Decided = module.polyphase
    (x,) = under_autocast(x)
    if cache is None:
        return infer(head, fold(head, dtype_of(head, x)), x, chosen, Prepared())
    prepared = Prepared()
    if isinstance(chosen, bool):
        chosen = Decided(policy(chosen))
    if chosen != NEVER and x.device.type == "cpu" and x.numel():
        prepared = cache.prepare(x.shape[-2], x.shape[-1], chosen)
    return infer(head, cache.folded, x, chosen, prepared)


def frozen_copy(module: FusedModule, x: Tensor, slot: str = CACHE) -> tuple[Head, FoldCache] | None:
    """What is used without a look at what it was made of."""
    cache = module.__dict__.get(slot)
    if cache is None or cache.head is None or module.training or not cache.in_range:
        return None
    if torch.is_grad_enabled() or in_forward_mode():
        return None
    if cache.dtype != dtype_of(cache.head, x) or cache.device != x.device:
        return None
    _check_features(module, cache.head, x)
    return cache.head, cache


def _cache(module: FusedModule, head: Head, dtype: torch.dtype, slot: str) -> FoldCache | None:
    cache = module.__dict__.get(slot)
    if cache is not None and cache.holds(head, dtype):
        return cache
    frozen = bool(module.__dict__.get(FROZEN))
    if not can_keep(head, frozen=frozen):
        return None
    check_tensors(head)
    # Outside inference mode, so that the copy can be used outside of it later.
    with torch.inference_mode(False), torch.no_grad():
        cache = FoldCache(head, dtype, frozen=frozen)
    if head.weight.is_cuda:
        # Another thread may read the copy on another stream.
        torch.cuda.current_stream(head.weight.device).synchronize()
    module.__dict__[slot] = cache
    return cache


def _has_state(base: type) -> bool:
    """Whether a class of anybody's says what of it is copied and pickled."""
    ours = base.__module__.startswith("aspp_ext.")
    return base is not object and not ours and "__getstate__" in vars(base)


def forward_like(original: type[nn.Module]) -> Any:
    """``forward`` of a fused class, for TorchScript the original's.

    TorchScript compiles the source that ``__wrapped__`` leads to, with the names that the function
    sees.
    """

    plain = original.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        fused = getattr(type(self), "fused_forward", None)
        if fused is None:  # unfused, under a wrapper that has kept this
            return plain(self, *args, **kwargs)
        return fused(self, *args, **kwargs)

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
