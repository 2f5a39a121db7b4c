# SPDX-License-Identifier: BSD-3-Clause
"""Whether a module still is what it was when it was looked at.

Its classes, their methods and what those read, its parts, their settings, and that nobody watches
those that are passed by.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from .constants import VALUES, Constant, Look, Missing, Unseen, difference, is_same, kind_of
from .parts import Unfusable, check_classes, part
from .reads import Written, change, written
from .stages import BATCH_NORMS, DROPOUTS, OTHER_NORMS
from .untouched import changed_methods

_OF_TORCH = frozenset(vars(nn.Module()))
# Of these each setting is read when they run.
_LIVE = (*BATCH_NORMS, *OTHER_NORMS, *DROPOUTS)
# What is set on a module for us, or by who wraps it, which is looked at elsewhere.
_SET_LATER = frozenset(("forward", "pool_batch_of_one", "polyphase"))


class Called(NamedTuple):
    """A part that is called as it is, of which others may rely on these."""

    inplace: Any
    shapes: tuple[tuple[str, tuple[int, ...] | None], ...]  # of its parameters
    settings: tuple[tuple[str, Any], ...]  # that others read
    absent: frozenset[str]


class Snapshot(NamedTuple):
    """One module and those in it."""

    kind: type[nn.Module]
    written: Written | None  # of the whole, by which it is read
    settings: tuple[tuple[str, Any], ...]
    objects: tuple[tuple[str, Constant], ...]  # other attributes
    absent: frozenset[str]  # names of attributes that somebody would read
    empty: tuple[tuple[str, bool], ...]  # of parameters and buffers whether they are None
    children: tuple[tuple[str, Snapshot | Called | None], ...]


def reads(module: nn.Module) -> Written:
    """How the classes in ``module``, and those of what it holds, are written, and what they read.

    Raises:
        Unfusable: they read what cannot be watched.
    """
    kinds = [kind_of(m) for m in module.modules()]
    look = Look()
    for m, kind in zip(module.modules(), kinds, strict=True):
        for _, value in _attributes(m, kind):
            if not _is_plain(value) or isinstance(value, _AS_THEY_ARE):
                _looked(look, value)
    held = [root for root in look.met if hasattr(root, "__name__")]
    return written(root for root in (*kinds, *held) if not _is_torchs(root))


def take(module: nn.Module, called: Collection[str], live: Collection[str]) -> Snapshot:
    """Look at ``module``, where the submodules ``called`` are called as they are, and norms among
    ``live`` are read as they are in each call.

    Raises:
        Unfusable: they read what cannot be watched.
    """
    found = reads(module)
    return _take(module, called, live, found.names, "")._replace(written=found)


def _take(
    module: nn.Module,
    called: Collection[str],
    live: Collection[str],
    names: frozenset[str],
    path: str,
) -> Snapshot:
    kind = kind_of(module)
    children: list[tuple[str, Snapshot | Called | None]] = []
    for name, child in module._modules.items():
        at = f"{path}.{name}" if path else name
        if child is None:
            children.append((name, None))
        elif at in called:
            children.append((name, _as_called(child, names)))
        else:
            children.append((name, _take(child, called, live, names, at)))
    ours = dict(_attributes(module, kind))
    if kind in _LIVE and path in live:  # but for what is read as a number, not by the layer
        ours = {k: v for k, v in ours.items() if k in names}
    objects = []
    for name, value in ours.items():
        if not _is_plain(value) and not isinstance(value, nn.Module):
            if isinstance(constant := _looked(Look(), value), Constant):
                objects.append((name, constant))
            elif name in names:
                raise Unfusable(f"it reads {name}, which {constant}")
    return Snapshot(
        kind,
        None,
        tuple((k, _fixed(v)) for k, v in ours.items() if _is_plain(v)),
        tuple(objects),
        _absent(module, names),
        () if _is_torchs(kind) else tuple(_empty(module)),
        tuple(children),
    )


def _looked(look: Look, value: Any) -> Constant | str:
    """What it is, or why it is not known."""
    try:
        return look.at(value)
    except Unseen as reason:
        return str(reason)


def _is_torchs(kind: Any) -> bool:
    return kind.__module__.partition(".")[0] in ("torch", "builtins")


def _absent(module: nn.Module, names: frozenset[str]) -> frozenset[str]:
    held = (vars(module), module._parameters, module._buffers, module._modules)
    return names.difference(*held) - _SET_LATER


def check(module: nn.Module, known: Snapshot, path: str = "") -> None:
    """Raises Unfusable, naming what is another than it was; below the module itself, hooks too."""
    where = path or "the module"
    if not path:
        if names := [name for name in changed_methods(module) if name != "forward"]:
            raise Unfusable(f"its {names[0]} is replaced")
    else:
        part(module, path, known.kind if kind_of(module) is not known.kind else type(module))
    if known.written is not None and (what := change(known.written)) is not None:
        raise Unfusable(f"{what}, which it reads, has changed: fuse it again")
    if _is_torchs(known.kind):
        check_classes(known.kind)
    if tuple(module._modules) != tuple(name for name, _ in known.children):
        raise Unfusable(f"{where} has other parts than it had: fuse it again")
    _check_settings(module, known, where)
    for name, constant in known.objects:
        if (inside := difference(getattr(module, name, Missing), constant)) is not None:
            raise Unfusable(f"{name}{inside} of {where} has changed: fuse it again")
    if not _is_torchs(known.kind) and tuple(_empty(module)) != known.empty:
        raise Unfusable(f"{where} has other parameters or buffers than it had: fuse it again")
    for name, child in known.children:
        found, at = module._modules[name], f"{path}.{name}" if path else name
        if (found is None) is not (child is None):
            raise Unfusable(f"{at} was there, or was not: fuse it again")
        if isinstance(child, Called):
            if found is not None:
                _check_settings(found, child, at)
                if _inplace(found) != child.inplace or _shapes(found) != child.shapes:
                    raise Unfusable(f"{at} has changed: fuse it again")
        elif child is not None and found is not None:
            check(found, child, at)


def _check_settings(module: nn.Module, known: Snapshot | Called, where: str) -> None:
    for name, value in known.settings:
        if _differs(getattr(module, name, Missing), value):
            raise Unfusable(f"{name} of {where} has changed: fuse it again")
    if torch.compiler.is_compiling():
        new = [name for name in module.__dict__ if name in known.absent]
    elif known.absent.isdisjoint(vars(module)):
        return
    else:
        new = sorted(known.absent.intersection(vars(module)))
    if new:
        raise Unfusable(f"{new[0]} of {where} has changed: fuse it again")


def _as_called(module: nn.Module, names: frozenset[str]) -> Called:
    read = {k: v for k, v in vars(module).items() if k in names and k not in _OF_TORCH}
    settings = tuple((k, _fixed(v)) for k, v in read.items() if _is_plain(v))
    return Called(_inplace(module), _shapes(module), settings, _absent(module, names))


def _inplace(module: nn.Module) -> Any:
    return getattr(module, "inplace", None)


def _shapes(module: nn.Module) -> tuple[tuple[str, tuple[int, ...] | None], ...]:
    shapes = ((n, None if p is None else tuple(p.shape)) for n, p in module._parameters.items())
    return tuple(shapes)


def _attributes(module: nn.Module, kind: type) -> Iterator[tuple[str, Any]]:
    """Its own, and those that its class has for all, which an instance may have instead."""
    own = vars(module)
    seen = set(own)
    for name, value in own.items():
        if name not in _OF_TORCH and not name.startswith("_aspp_ext"):
            yield name, value
    if _is_torchs(kind):
        return
    for base in kind.__mro__:
        if base is nn.Module:
            break
        for name, value in vars(base).items():
            if not name.startswith("__") and name not in seen and isinstance(value, VALUES):
                yield name, value
        seen.update(vars(base))


def _empty(module: nn.Module) -> Iterator[tuple[str, bool]]:
    for held in (module._parameters, module._buffers):
        for name, tensor in held.items():
            yield name, tensor is None


_AS_THEY_ARE = (type, types.FunctionType, types.BuiltinFunctionType)


def _is_plain(value: Any) -> bool:
    """Whether it is compared at once."""
    if type(value) in (tuple, list):
        return len(value) < 64 and all(type(item) in VALUES for item in value)
    return type(value) in VALUES or isinstance(value, _AS_THEY_ARE)


def _fixed(value: Any) -> Any:
    """A copy of what may be written to."""
    return list(value) if type(value) is list else value


def _differs(value: Any, known: Any) -> bool:
    return type(value) is not type(known) or not is_same(value, known)
