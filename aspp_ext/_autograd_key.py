# SPDX-License-Identifier: BSD-3-Clause
"""Gradients registered at the dispatcher's Autograd key.

``torch.library.register_autograd`` drops forward-mode tangents without a word and does not work
under ``torch.func`` (pytorch/pytorch#179652). An ``autograd.Function`` called from a kernel at the
Autograd key serves reverse and forward mode, any order of both, ``torch.func`` and
``torch.compile``. It needs a few private names of PyTorch; where one is missing, ``unavailable``
says so, the native operators are not used, and the reference takes over.

A function class given to :func:`register` has, besides the usual static methods ``setup_context``,
``backward`` and ``jvp``, two more: ``pack(*op_arguments) -> inputs`` (every tensor an input of its
own) and ``call(op, *inputs) -> outputs`` which calls ``op`` with its own argument list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ._registrations import implement, name_of

try:
    from torch._functorch.autograd_function import enable_single_level_autograd_function
    from torch.autograd.function import _SingleLevelFunction

    _below_autograd = torch._C._AutoDispatchBelowAutograd
    _after_autograd = torch._C._after_autograd_keyset
except (ImportError, AttributeError) as error:  # a PyTorch that renamed them
    unavailable: str | None = f"PyTorch {torch.__version__} lacks an autograd interface: {error}"
else:
    unavailable = None


def needs_gradient(tensors: Sequence[Tensor]) -> bool:
    """Whether a call on these tensors has to be recorded, in reverse or forward mode."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def tensors_in(arguments: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for a in arguments:
        if isinstance(a, Tensor):
            found.append(a)
        elif isinstance(a, (list, tuple)):
            found.extend(t for t in a if isinstance(t, Tensor))
    return found


def _single_level(function: Any, family: Any) -> Any:
    """The same formulas as ``function``, in the form the Autograd key can apply."""
    formula = function.backward  # by the class, the compiler takes it for its own Function's

    class SingleLevel(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, op: Any, keyset: Any, *inputs: Any) -> Any:
            # A Function runs its forward without grad mode; an outer transform still wants it.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), _below_autograd():
                outputs = function.call(
                    lambda *a: op.redispatch(keyset & _after_autograd, *a), *inputs
                )
            ctx.family = family
            function.setup_context(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return (None, None, *formula(ctx, *grads))

        @staticmethod
        def jvp(ctx: Any, _op: Any, _keyset: Any, *tangents: Any) -> Any:
            return function.jvp(ctx, *tangents)

        # What compiled autograd tells Functions apart by, as torch.autograd.Function has it.
        _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)

    SingleLevel.__name__ = function.__name__
    return SingleLevel


def register(
    op: Any,
    function: Any,
    family: Any,
    check: Callable[..., Any],
    unpack: Callable[..., Any] = lambda outputs, *_: outputs,
    before: Callable[..., Any] | None = None,
) -> None:
    """Registers ``function`` as the gradient of ``op``.

    Args:
        family: the operators to differentiate with, which the formulas find as ``ctx.family``.
        check: ``(*op_arguments)``, refuses what the operator refuses.
        unpack: ``(flat outputs, *op_arguments) -> what op returns``.
        before: ``(*op_arguments) -> result | None``, asked first when a gradient is needed; a
            result other than None, built of differentiable operators, replaces the formula.
    """
    if unavailable is not None:
        return
    single = _single_level(function, family)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if needs_gradient(tensors_in(arguments)):
            check(*arguments)
            composed = before(*arguments) if before is not None else None
            if composed is not None:
                return composed
            with enable_single_level_autograd_function():
                return unpack(single.apply(op, keyset, *function.pack(*arguments)), *arguments)
        with _below_autograd():
            return op.redispatch(keyset & _after_autograd, *arguments)

    _install(op, kernel)


def _install(op: Any, kernel: Callable[..., Any]) -> None:
    implement(name_of(op), "Autograd", kernel, with_keyset=True)


def compose_gradient(op: Any, composed: Callable[..., Any]) -> None:
    """``composed(*op_arguments)``, of differentiable operators, runs where a gradient is needed."""
    if unavailable is not None:
        return

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if needs_gradient(tensors_in(arguments)):
            return composed(*arguments)
        with _below_autograd():
            return op.redispatch(keyset & _after_autograd, *arguments)

    _install(op, kernel)


def refuse_gradient(op: Any, sentence: str) -> None:
    """An operator without gradients says so instead of returning a constant."""

    def refuse(*_: Any) -> Any:
        raise NotImplementedError(sentence)

    compose_gradient(op, refuse)
