# SPDX-License-Identifier: BSD-3-Clause
"""Pyramids by their structure: found, read, described and tried out."""

from __future__ import annotations

import inspect
import threading
import types
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from aspp_ext.modules.described import Description, become, fused_class, taken_name
from aspp_ext.modules.parts import Unfusable, Unread, check_calls
from aspp_ext.modules.program import Layer, Operator, Program, Pyramid
from aspp_ext.modules.snapshot import check, take

from . import floor
from .match import program_of
from .observe import in_a_line, looks_like_pyramid, made_up, on_meta, siblings, without_values
from .own_class import check_super, is_asked_for
from .trace import trace
from .trial import generators, try_out


def describe(
    module: nn.Module,
    arguments: tuple[Any, ...] | None = None,
    apart: Collection[int] = (),
    *,
    deep: bool = False,
) -> Description | floor.Plan | None:
    """What ``module`` computes, or where its forward cannot be read the convolutions of one map in
    it, or None if there is no pyramid in it.

    Args:
        module: any.
        arguments: that it takes, on the meta device; None: a map of the channels that one of its
            convolutions reads.
        apart: ids of modules that are fused on their own.
        deep: whether a pyramid may be in one part of it, too.

    Raises:
        Unfusable: it may be a pyramid, but cannot be fused; why.
    """
    if (name := taken_name(module)) is not None:
        raise Unfusable(f"its {name} has the name of something that fused modules have")
    with _LOCK, generators():
        try:
            return _describe(module, arguments, apart, deep)
        except Unfusable:
            raise
        except Exception as error:  # of a class that does something in being copied or derived from
            kind = type(error).__name__
            raise Unfusable(f"it cannot be read: {kind}: {in_a_line(error)}") from error


_LOCK = threading.RLock()  # tracing sets what is one for the whole process


def _describe(
    module: nn.Module, arguments: tuple[Any, ...] | None, apart: Collection[int], deep: bool
) -> Description | floor.Plan | None:
    try:
        twin = on_meta(module)
    except Unfusable:
        raise
    except Exception as error:
        raise Unfusable(f"it cannot be copied: {in_a_line(error)}") from error
    if not _takes_maps(module):
        if looks_like_pyramid(module):
            raise Unfusable("its forward takes no map by place")
        return None
    if arguments is not None:
        arguments = tree_map(_of_several, arguments)
    whole = {name for name, part in module.named_modules() if id(part) in apart}
    known = {id(p) for name in whole for p in twin.get_submodule(name).parameters()}
    failures: list[Exception] = []
    atrous = 0
    for given in made_up(module) if arguments is None else [arguments]:
        try:
            atrous = siblings(twin, given, known, deep=deep)
            arguments = given
            failures.clear()
            break
        except Unfusable:
            raise
        except Exception as error:
            failures.append(error)
    if failures and looks_like_pyramid(module):
        raise without_values(failures[0])
    if not atrous or arguments is None:
        return None
    check_calls()
    try:
        _check_readable(module, arguments)
        check_super(type(module))
        traced = trace(twin, arguments, whole)
        program = program_of(traced, module)
    except Unfusable as reason:
        if atrous == 1:  # a block with a shortcut, most often
            return None
        if isinstance(reason, Unread):
            return floor.plan(module, twin, arguments, whole, str(reason))
        raise
    layers = called(program)
    live = _absorbed(program)
    description = Description(program, take(module, layers, live))
    check(module, description.snapshot)

    def fuse(copied: nn.Module) -> None:
        # Its own snapshot, as norms of the twin may be of other classes.
        become(copied, description._replace(snapshot=take(copied, layers, live)))

    def only_derive(copied: nn.Module) -> None:
        copied.__class__ = fused_class(type(copied))

    try_out(twin, fuse, arguments)
    if is_asked_for(type(module)):
        try:
            try_out(twin, only_derive, arguments)
        except Unfusable:
            said = "its own forward computes something else in a subclass, as fused classes are"
            return floor.plan(module, twin, arguments, whole, said)
    return description


def _takes_maps(module: nn.Module) -> bool:
    """Whether its forward can be called with anything by place."""
    try:
        inspect.signature(module.forward).bind(None)
    except TypeError as error:
        return "too many" not in str(error)
    except ValueError:  # of what is not written in Python
        pass
    return True


def _check_readable(module: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Raises Unread."""
    kind = type(module)
    if kind.__call__ is not nn.Module.__call__:
        raise Unread("its class has a __call__ of its own")
    # A partialmethod makes another function each time.
    if not isinstance(kind.forward, types.FunctionType) or kind.forward is not kind.forward:
        made = type(inspect.getattr_static(kind, "forward")).__name__
        raise Unread(f"its forward is a {made}, not a function")
    for x in tree_leaves(arguments):
        if not isinstance(x, Tensor):
            raise Unread(f"its forward takes a {type(x).__name__}")
        if x.dim() != 4 or not x.is_floating_point():
            raise Unread("its forward takes something else than maps")


def _of_several(x: Any) -> Any:
    """A batch of one would be read as that of a batch of one."""
    if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[0] != 1:
        return x
    return x.new_empty((2, *x.shape[1:]))


def is_whole(description: Description) -> bool:
    """Whether its pyramids end in projections."""
    return all(p.project is not None for p in description.program.pyramids)


def called(program: Program) -> set[str]:
    """The layers that a program calls as they are."""
    return {step.path for step in program.steps if isinstance(step, Layer)} - _absorbed(program)


def _absorbed(program: Program) -> set[str]:
    found: set[str] = set()

    def note(part: Any) -> None:
        if isinstance(part, Layer):
            found.add(part.path)
        elif isinstance(part, (list, tuple)) and not isinstance(part, Operator):
            for item in part:
                note(item)

    for step in program.steps:
        if isinstance(step, Pyramid):
            note(step[1:])
            for conv in _convs(step):
                found.update(() if conv is None or conv.path is None else (conv.path,))
    return found


def _convs(pyramid: Pyramid) -> Iterator[Any]:
    for branch in pyramid.branches:
        yield from (branch.depthwise, branch.conv)
    yield None if pyramid.pool is None else pyramid.pool.conv
    yield pyramid.project
