# SPDX-License-Identifier: BSD-3-Clause
"""The fused forward of a class that nobody here knows, by what its module was seen to compute."""

from __future__ import annotations

import contextlib
import functools
import threading
import types
from collections.abc import Iterator
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

    def fused_forward(self, *arguments: Any, **keywords: Any) -> Any:
        """The forward, of the arguments that the original's takes."""
        own = _refuse if getattr(_on_trial, "on", False) else super().forward
        if keywords or needs_plain_operators():
            return own(*arguments, **keywords)
        description: Description = self.__dict__[PROGRAM]
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
        description: Description = module.__dict__[PROGRAM]
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
        if type(self) is not fused_class(type(self).original):
            return super().__reduce_ex__(protocol)
        return _revive, (type(self).original,), self.__getstate__()


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
    raise Unfusable("what was read of its forward does not run here")


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
    """``class Fused<original>(DescribedForward, original)``, made when first asked for."""
    return _made_class(original)


@functools.cache
def _made_class(original: Any) -> Any:

    def fill(body: dict[str, Any]) -> None:
        body["original"] = original
        body["__module__"] = original.__module__
        body["__doc__"] = f"``{original.__module__}.{original.__qualname__}``, fused."

    name = f"Fused{original.__name__}"
    return types.new_class(name, (DescribedForward, original), {}, fill)


def become(module: nn.Module, description: Description) -> None:
    """Make ``module`` fused, in place."""
    module.__class__ = fused_class(type(module))
    vars(module)[PROGRAM] = description


def _revive(original: type[nn.Module]) -> DescribedForward:
    kind = fused_class(original)
    return kind.__new__(kind)


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
