# SPDX-License-Identifier: BSD-3-Clause
"""Pyramids by their structure: found, read, described and tried out."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from aspp_ext.modules.described import Description, become
from aspp_ext.modules.parts import Unfusable, Unread, check_calls
from aspp_ext.modules.program import Layer, Operator, Program, Pyramid
from aspp_ext.modules.snapshot import check, take

from . import floor
from .match import program_of
from .observe import looks_like_pyramid, made_up, on_meta, siblings
from .trace import trace
from .trial import try_out


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
    try:
        twin = on_meta(module)
    except Exception as error:
        raise Unfusable(f"it cannot be copied: {error}") from error
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
        raise Unfusable(
            f"its forward takes no map of channels that its convolutions read ({failures[0]}): "
            "example_inputs may help"
        )
    if not atrous or arguments is None:
        return None
    check_calls()
    try:
        traced = trace(twin, arguments, whole)
        program = program_of(traced, module)
    except Unfusable as reason:
        if atrous == 1:  # a block with a shortcut, most often
            return None
        if isinstance(reason, Unread):
            return floor.plan(module, twin, arguments, whole, str(reason))
        raise
    description = Description(program, take(module, called(program)))
    check(module, description.snapshot)
    try_out(twin, lambda copied: become(copied, description), arguments)
    return description


def is_whole(description: Description) -> bool:
    """Whether its pyramids end in projections."""
    pyramids = [s for s in description.program.steps if isinstance(s, Pyramid)]
    return all(p.project is not None for p in pyramids)


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
