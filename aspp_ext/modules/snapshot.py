# SPDX-License-Identifier: BSD-3-Clause
"""Whether a module still is what it was when it was looked at.

Its classes and their methods, its parts, their settings, and that nobody watches those that are
passed by.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from .parts import Unfusable, check_classes, part
from .stages import BATCH_NORMS, DROPOUTS, OTHER_NORMS
from .untouched import Written, changed_methods, written

_OF_TORCH = frozenset(vars(nn.Module()))
# Of these each setting is read when they run.
_LIVE = (*BATCH_NORMS, *OTHER_NORMS, *DROPOUTS)


class Called(NamedTuple):
    """A part that is called as it is, of which others may rely on these."""

    inplace: Any
    shapes: tuple[tuple[str, tuple[int, ...] | None], ...]  # of its parameters


class Snapshot(NamedTuple):
    """One module and those in it."""

    kind: type[nn.Module]
    written: Written | None  # None of PyTorch's own
    settings: tuple[tuple[str, Any], ...]
    objects: tuple[tuple[str, type, tuple[tuple[str, Any], ...]], ...]  # attributes' settings
    empty: tuple[tuple[str, bool], ...]  # of parameters and buffers whether they are None
    children: tuple[tuple[str, Snapshot | Called | None], ...]


def take(
    module: nn.Module, called: Collection[str], live: Collection[str], path: str = ""
) -> Snapshot:
    """Look at ``module``, where the submodules ``called`` are called as they are, and norms among
    ``live`` are read as they are in each call."""
    kind = _kind(module)
    children: list[tuple[str, Snapshot | Called | None]] = []
    for name, child in module._modules.items():
        at = f"{path}.{name}" if path else name
        if child is None:
            children.append((name, None))
        elif at in called:
            children.append((name, _as_called(child)))
        else:
            children.append((name, take(child, called, live, at)))
    torch_s = kind.__module__.startswith("torch.nn.")
    ours = {} if kind in _LIVE and path in live else dict(_attributes(module, kind))
    others = {k: v for k, v in ours.items() if not _is_plain(v)}
    objects = (
        (k, type(o), tuple((n, v) for n, v in vars(o).items() if _is_plain(v)))
        for k, o in others.items()
        if hasattr(o, "__dict__") and not isinstance(o, nn.Module)
    )
    return Snapshot(
        kind,
        None if torch_s else written(kind),
        tuple((k, _fixed(v)) for k, v in ours.items() if _is_plain(v)),
        tuple(objects),
        () if torch_s else tuple(_empty(module)),
        tuple(children),
    )


def check(module: nn.Module, known: Snapshot, path: str = "") -> None:
    """Raises Unfusable, naming what is another than it was; below the module itself, hooks too."""
    where = path or "the module"
    if not path:
        if names := [name for name in changed_methods(module) if name != "forward"]:
            raise Unfusable(f"its {names[0]} is replaced")
    else:
        part(module, path, known.kind if _kind(module) is not known.kind else type(module))
    if known.written is None:
        check_classes(known.kind)
    elif written(known.kind) is not known.written:
        raise Unfusable(f"a method of {known.kind.__name__}, or what it reads, is replaced")
    if tuple(module._modules) != tuple(name for name, _ in known.children):
        raise Unfusable(f"{where} has other parts than it had: fuse it again")
    for name, value in known.settings:
        if _differs(getattr(module, name, None), value):
            raise Unfusable(f"{name} of {where} has changed: fuse it again")
    for name, kind, settings in known.objects:
        owner = getattr(module, name, None)
        if type(owner) is not kind:
            raise Unfusable(f"{name} of {where} has changed: fuse it again")
        for setting, value in settings:
            if _differs(getattr(owner, setting, None), value):
                raise Unfusable(f"{name}.{setting} of {where} has changed: fuse it again")
    if known.empty and tuple(_empty(module)) != known.empty:
        raise Unfusable(f"{where} has other parameters or buffers than it had: fuse it again")
    for name, child in known.children:
        found, at = module._modules[name], f"{path}.{name}" if path else name
        if (found is None) is not (child is None):
            raise Unfusable(f"{at} was there, or was not: fuse it again")
        if isinstance(child, Called):
            if found is not None and _as_called(found) != child:
                raise Unfusable(f"{at} has changed: fuse it again")
        elif child is not None and found is not None:
            check(found, child, at)


def _as_called(module: nn.Module) -> Called:
    shapes = ((n, None if p is None else tuple(p.shape)) for n, p in module._parameters.items())
    return Called(getattr(module, "inplace", None), tuple(shapes))


def _kind(module: nn.Module) -> type[nn.Module]:
    return getattr(type(module), "original", type(module))


def _attributes(module: nn.Module, kind: type) -> Iterator[tuple[str, Any]]:
    """Its own, and those that its class has for all, which an instance may have instead."""
    own = vars(module)
    seen = set(own)
    for name, value in own.items():
        if name not in _OF_TORCH and not name.startswith("_aspp_ext"):
            yield name, value
    if kind.__module__.startswith("torch.nn."):
        return
    for base in kind.__mro__:
        if base is nn.Module:
            break
        for name, value in vars(base).items():
            if not name.startswith("__") and name not in seen and isinstance(value, _SIMPLE):
                yield name, value
        seen.update(vars(base))


def _empty(module: nn.Module) -> Iterator[tuple[str, bool]]:
    for held in (module._parameters, module._buffers):
        for name, tensor in held.items():
            yield name, tensor is None


_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype)
_AS_THEY_ARE = (type, types.FunctionType, types.BuiltinFunctionType)


def _is_plain(value: Any) -> bool:
    if type(value) in (tuple, list):
        return len(value) < 64 and all(map(_is_plain, value))
    if type(value) is dict:
        return len(value) < 64 and all(map(_is_plain, (*value, *value.values())))
    if type(value) is functools.partial:
        return all(map(_is_plain, (value.func, value.args, value.keywords)))
    return type(value) in _SIMPLE or isinstance(value, _AS_THEY_ARE)


def _fixed(value: Any) -> Any:
    """A copy of what may be written to."""
    if type(value) in (tuple, list):
        return type(value)(map(_fixed, value))
    if type(value) is dict:
        return {key: _fixed(item) for key, item in value.items()}
    return value


def _differs(value: Any, known: Any) -> bool:
    if type(value) is not type(known):
        return True
    if type(known) is functools.partial:
        pairs = ((value.func, known.func), (value.args, known.args))
        return any(_differs(a, b) for a, b in (*pairs, (value.keywords, known.keywords)))
    return value != known and not (value != value and known != known)
