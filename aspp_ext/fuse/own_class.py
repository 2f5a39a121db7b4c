# SPDX-License-Identifier: BSD-3-Clause
"""What a class's methods ask of the class that they run in, which a fused module's is not quite.

The fused class has its original's names, but is another one: ``super(type(self), self)`` calls the
method that it stands in without end, and ``type(self) is Head`` is not true.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Iterator

from torch import nn

from aspp_ext.modules.parts import Unread


def check_super(kind: type[nn.Module]) -> None:
    """Raises Unread where a method looks behind the class that its object happens to have."""
    for code in _codes(kind):
        steps = [step for step in dis.get_instructions(code) if step.opname != "PUSH_NULL"]
        for i, step in enumerate(steps):
            if step.argval != "super" or not step.opname.startswith("LOAD_"):
                continue
            # Of super() and super(Head, self) the class is loaded by another name.
            ahead = {(s.opname.rpartition("_")[2], s.argval) for s in steps[i + 1 : i + 4]}
            if ahead & {("GLOBAL", "type"), ("ATTR", "__class__")}:
                raise Unread(
                    f"its {code.co_name} calls super of the class of its object: in a subclass, as "
                    "fused classes are, it would call itself"
                )


def is_asked_for(kind: type[nn.Module]) -> bool:
    """Whether a method may compare the class of its object with others."""
    return any({"type", "__class__"} & {*code.co_names} for code in _codes(kind))


def _codes(kind: type[nn.Module]) -> Iterator[types.CodeType]:
    """Of methods and properties that are not PyTorch's, and of functions in them."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins", "aspp_ext"):
            continue
        for member in vars(base).values():
            function = getattr(member, "fget", getattr(member, "__func__", member))
            if isinstance(function, types.FunctionType):
                yield from _with_inner(function.__code__)


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_inner(constant)
