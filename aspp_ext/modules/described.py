# SPDX-License-Identifier: BSD-3-Clause
"""The fused forward of a class that nobody here knows, by what its module was seen to compute."""

from __future__ import annotations

import abc
import contextlib
import copyreg
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aspp_ext.ops.registration import is_autocast_on

from .fused import (
    CACHE,
    FROZEN,
    PROGRAM,
    FusedModule,
    dtype_of,
    forward_like,
    frozen_copy,
    infer_folded,
    needs_plain_operators,
    way,
)
from .head import Head
from .layers import forward_layers
from .meaning import gives_meaning
from .parts import Unfusable, check_calls, check_channels, check_tensors
from .program import Changed, Program, bind, head_of, run
from .snapshot import Snapshot, check
from .tracing import may_be_traced


class Description(NamedTuple):
    """What was seen of a module."""

    program: Program
    snapshot: Snapshot


class DescribedForward(FusedModule):
    """Mix-in for any class: the instance carries its description.

    What the description does not cover, other arguments or a module that has been changed since,
    the module's own forward computes.
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        if "original" in vars(cls):
            cls.forward = forward_like(cls.original)
        else:  # somebody's own, of which the original's may take note
            super().__init_subclass__(**keywords)

    def fused_forward(self, *arguments: Any, **keywords: Any) -> Any:
        """The forward, of the arguments that the original's takes."""
        own = _refuse if getattr(_on_trial, "on", False) else super().forward
        description: Description | None = self.__dict__.get(PROGRAM)
        if description is None:  # made by its class, not by fuse
            return super().forward(*arguments, **keywords)
        if keywords or needs_plain_operators():
            return own(*arguments, **keywords)
        program = description.program
        inputs = bind(program.arguments, arguments)
        if inputs is None or not _are_features(inputs, program):
            return own(*arguments)
        if program.casts and is_autocast_on(inputs[0]):  # in which maps have other dtypes
            return own(*arguments)
        if program.asks_for_mode and any(m.training != self.training for m in self.modules()):
            return own(*arguments)  # whose it asks for does not show
        traced = may_be_traced()
        quick = FROZEN in self.__dict__ and not (traced or self.training)
        try:
            heads = type(self).described_heads(
                self, look=not (quick and not torch.is_grad_enabled())
            )
            for head in heads:
                check_tensors(head)
        except Unfusable:
            return own(*arguments)
        sources = [spec.source for spec in program.pyramids]
        for head, source in zip(heads, sources, strict=True):
            of_input = source < len(inputs) or program.casts
            if of_input and not _fits(head, inputs[min(source, len(inputs) - 1)]):
                return own(*arguments)

        def pyramid(i: int, x: Tensor) -> Any:
            slot = f"{CACHE}_{i}" if i else CACHE
            if not traced and (frozen := frozen_copy(self, x, slot)) is not None:
                return infer_folded(self, *frozen, x)
            layers, cache = way(self, heads[i], x, traced, slot)
            if layers:
                return forward_layers(heads[i], x, self.pool_batch_of_one, self.polyphase)
            return infer_folded(self, heads[i], cache, x)

        return run(program, self, inputs, pyramid)

    @classmethod
    def described_heads(cls, module: nn.Module, look: bool = True) -> list[Head]:
        """The parts of the pyramids, in the order of the steps.

        Raises:
            Unfusable: naming what has changed since the module was described.
        """
        description: Description | None = module.__dict__.get(PROGRAM)
        if description is None:
            raise Unfusable("it was made by its class and has not been read: fuse it again")
        if look:
            check_calls()
            check(module, description.snapshot)
        try:
            description.program.check(module)
            heads = [head_of(module, spec) for spec in description.program.pyramids]
        except Changed as change:
            raise Unfusable(f"{change}: fuse it again") from change
        for head in heads:
            check_channels(head)
        return heads

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind, made = type(self), super().__reduce_ex__(max(protocol, 2))
        if kind is not fused_class(kind.original) or not isinstance(made, tuple):
            return made
        make, arguments, *state = made
        if make in (copyreg.__newobj__, copyreg.__newobj_ex__):  # type: ignore[attr-defined]
            return _revive, (kind.original, *_for_new(make, arguments)), *state
        # The original's own way, of the class that can be found by its name.
        make, *arguments = (kind.original if a is kind else a for a in (make, *arguments))
        return make, tuple(arguments), *state


def _for_new(make: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the original's ``__new__`` takes."""
    plain = make is copyreg.__newobj__  # type: ignore[attr-defined]
    return (arguments[1:], {}) if plain else arguments[1:]


_on_trial = threading.local()


@contextlib.contextmanager
def no_way_out() -> Iterator[None]:
    """Meanwhile, in this thread, who would run a module's own forward raises Unfusable."""
    _on_trial.on = True
    try:
        yield
    finally:
        _on_trial.on = False


def _refuse(*_: Any, **__: Any) -> Any:
    raise Unfusable("its own forward would run")


# A module's own names come behind those of the mix-in.
_TAKEN = {
    name
    for base in DescribedForward.__mro__[:2]
    for name in vars(base)
    if not hasattr(nn.Module, name)
}


def taken_name(module: nn.Module) -> str | None:
    """A name that the module, or its class, uses and the fused forward, too."""
    mine = {name for base in type(module).__mro__ if base is not nn.Module for name in vars(base)}
    held = (module._modules, module._parameters, module._buffers, vars(module))
    taken = (mine & (_TAKEN | {"original"})) | (_TAKEN & set().union(*held))
    return min(taken, default=None)


def fused_class(original: Any) -> type[DescribedForward]:
    """``class Head(DescribedForward, Head)``, made when first asked for."""
    return _made_class(original)


@functools.cache
def _made_class(original: Any) -> Any:
    # Under the original's name, by which its methods may look things up, and behind the back of
    # registries: neither __init_subclass__ nor what a metaclass does to new classes runs.
    body = {
        "original": original,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": f"``{original.__module__}.{original.__qualname__}``, fused.",
    }
    meta = type(original)
    plain = abc.ABCMeta if issubclass(meta, abc.ABCMeta) else type
    return plain.__new__(meta, original.__name__, (DescribedForward, original), body)


def become(module: nn.Module, description: Description) -> None:
    """Make ``module`` fused, in place."""
    module.__class__ = fused_class(type(module))
    vars(module)[PROGRAM] = description


def _revive(
    original: type[nn.Module], arguments: Sequence[Any] = (), keywords: Any = None
) -> DescribedForward:
    kind = fused_class(original)
    return kind.__new__(kind, *arguments, **(keywords or {}))


def _are_features(inputs: list[Tensor], program: Program) -> bool:
    """Whether all are maps of the channels that were seen, as many of each."""
    for x, channels in zip(inputs, program.channels, strict=True):
        if gives_meaning(type(x)) or x.dim() != 4 or x.shape[1] != channels:
            return False
        if x.shape[0] != inputs[0].shape[0]:
            return False
    return True


def _fits(head: Head, x: Tensor) -> bool:
    """Whether x has the dtype in which the head computes; else the layers have words for it."""
    dtype = dtype_of(head, x)
    given = x.dtype
    if given.is_floating_point and given != torch.float64 and is_autocast_on(x):
        given = torch.get_autocast_dtype(x.device.type)
    return given == dtype and x.device == head.weight.device and x.layout is torch.strided
