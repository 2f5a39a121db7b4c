# SPDX-License-Identifier: BSD-3-Clause
"""The fused forward of a class that nobody here knows, by what its module was seen to compute."""

from __future__ import annotations

import functools
import types
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aspp_ext.ops.registration import is_autocast_on

from .fused import (
    CACHE,
    FROZEN,
    PROGRAM,
    FusedForward,
    dtype_of,
    needs_plain_operators,
)
from .head import Head
from .layers import forward_layers
from .meaning import gives_meaning
from .parts import Unfusable, check_calls, check_channels, check_tensors
from .program import Changed, Program, Pyramid, bind, head_of, run
from .snapshot import Snapshot, check
from .tracing import may_be_traced


class Description(NamedTuple):
    """What was seen of a module."""

    program: Program
    snapshot: Snapshot


class DescribedForward(FusedForward):
    """Mix-in like :class:`FusedForward`, for any class: the instance carries its description.

    What the description does not cover, other arguments or a module that has been changed since,
    the module's own forward computes.
    """

    def compute(self, *arguments: Any, **keywords: Any) -> Any:
        """The forward, of the arguments that the original's takes."""
        own = super().forward
        if keywords or needs_plain_operators():
            return own(*arguments, **keywords)
        description: Description = self.__dict__[PROGRAM]
        program = description.program
        inputs = bind(program.arguments, arguments)
        if inputs is None or not _are_features(inputs, program):
            return own(*arguments)
        traced = may_be_traced()
        quick = FROZEN in self.__dict__ and not (traced or self.training)
        try:
            heads = type(self).heads(self, look=not (quick and not torch.is_grad_enabled()))
            for head in heads:
                check_tensors(head)
        except Unfusable:
            return own(*arguments)
        sources = [s.source for s in program.steps if isinstance(s, Pyramid)]
        for head, source in zip(heads, sources, strict=True):
            if source < len(inputs) and not _fits(head, inputs[source]):
                return own(*arguments)

        def pyramid(i: int, x: Tensor) -> Any:
            slot = f"{CACHE}_{i}" if i else CACHE
            if not traced and (frozen := self._frozen_copy(x, slot)) is not None:
                return self._infer(*frozen, x)
            layers, cache = self._way(heads[i], x, traced, slot)
            if layers:
                return forward_layers(heads[i], x, self.pool_batch_of_one, self.polyphase)
            return self._infer(heads[i], cache, x)

        return run(program, self, inputs, pyramid)

    @classmethod
    def heads(cls, module: nn.Module, look: bool = True) -> list[Head]:
        """The parts of the pyramids, in the order of the steps.

        Raises:
            Unfusable: naming what has changed since the module was described.
        """
        description: Description = module.__dict__[PROGRAM]
        if look:
            check_calls()
            check(module, description.snapshot)
        pyramids = [s for s in description.program.steps if isinstance(s, Pyramid)]
        try:
            heads = [head_of(module, spec) for spec in pyramids]
        except Changed as change:
            raise Unfusable(f"{change}: fuse it again") from change
        for head in heads:
            check_channels(head)
        return heads

    @classmethod
    def describe(cls, module: nn.Module) -> Head:
        """The parts of the first pyramid; raises Unfusable."""
        return cls.heads(module)[0]

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) is not fused_class(self.original):
            return super().__reduce_ex__(protocol)
        return _revive, (self.original,), self.__getstate__()


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
