# SPDX-License-Identifier: BSD-3-Clause
"""The way back from a fused class, also out of the wrappers that others have put around it."""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import nn

from aspp_ext.modules.fused import PROGRAM, SETTINGS, FusedModule
from aspp_ext.modules.siblings import GROUPING, MEMBER, Grouping, SiblingConv2d


def descends(kind: type, ours: type) -> bool:
    """Also from the class of an ``aspp_ext`` that was imported before this one, as notebooks do."""
    name = (ours.__module__, ours.__qualname__)
    return any((base.__module__, base.__qualname__) == name for base in kind.__mro__)


def is_ours(kind: type) -> bool:
    """Whether it is a class that fusing gives."""
    return descends(kind, FusedModule) or descends(kind, SiblingConv2d)


def restore(module: Any) -> str | None:
    """Give ``module`` its original class back, or return the reason why that cannot be done."""
    kind: Any = type(module)
    plain = _without_fused(kind)
    if plain is None:
        return f"{kind.__module__}.{kind.__qualname__} is a subclass of the fused class"
    if descends(kind, FusedModule):
        module.drop_folded()
    for setting in (*SETTINGS, PROGRAM, MEMBER):
        vars(module).pop(setting, None)
    module.__class__ = plain
    return None


def restore_siblings(module: nn.Module) -> dict[str, Any]:
    """Give the convolutions that were switched for ``module`` their class back; what it had."""
    grouping = vars(module).pop(GROUPING)
    groups = [id(siblings) for siblings in grouping.groups]
    for conv in module.modules():
        member = vars(conv).get(MEMBER)
        if member is not None and id(member.siblings) in groups:
            restore(conv)
    if not isinstance(grouping, Grouping):  # of an earlier import
        return {}
    return {GROUPING: grouping, "polyphase": all(g.polyphase for g in grouping.groups)}


def _is_written(kind: type) -> bool:
    """Whether its module has a class at its place, this one or what a notebook made of it since."""
    found: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = True if name == "<locals>" else getattr(found, name, None)
        if found in (True, None):
            break
    return found is not None


@functools.cache
def _without_fused(kind: Any) -> type[nn.Module] | None:
    """The class made of what ``kind`` is made of, with the original for the fused one.

    FSDP2's ``fully_shard`` and ``register_parametrization`` make a class at run time, and an
    instance a member of it: ``type("FSDPFusedASPP", (FSDPModule, FusedASPP), {...})``. A class that
    somebody wrote is left alone, since its methods may count on what it is derived from.
    """
    if "original" in vars(kind):
        return kind.original
    if _is_written(kind) or "forward" in vars(kind):
        return None
    bases = [_without_fused(base) if is_ours(base) else base for base in kind.__bases__]
    if None in bases:
        return None
    body = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    name = kind.__name__.replace("Fused", "").replace("SiblingConv2d", "Conv2d")
    return type(name, tuple(bases), body)  # type: ignore[arg-type]
