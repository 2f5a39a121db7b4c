# SPDX-License-Identifier: BSD-3-Clause
"""Whether a module still is what it was when it was looked at.

Its classes and their methods, its parts, their settings, and that nobody watches those that are
passed by.
"""

from __future__ import annotations

import types
from collections.abc import Collection
from typing import Any, NamedTuple

from torch import nn

from .parts import LAYERS, Unfusable, check_classes, part
from .stages import ACTIVATIONS
from .untouched import Written, written

# Of these PyTorch's own methods are looked at, by :func:`check_classes`.
_PLAIN = (*LAYERS, *ACTIVATIONS, nn.ModuleDict)
_OF_TORCH = frozenset(vars(nn.Module()))


class Snapshot(NamedTuple):
    """One module and those in it."""

    kind: type[nn.Module]
    written: Written | None  # None of PyTorch's own
    settings: tuple[tuple[str, Any], ...]
    objects: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]  # settings of attributes
    children: tuple[tuple[str, Snapshot | None], ...]  # None: is called, so it may change


def take(module: nn.Module, called: Collection[str], path: str = "") -> Snapshot:
    """Look at ``module``, where the submodules ``called`` are called as they are."""
    kind = getattr(type(module), "original", type(module))
    children = []
    for name, child in module._modules.items():
        at = f"{path}.{name}" if path else name
        whole = None if child is None or at in called else take(child, called, at)
        children.append((name, whole))
    torch_s = kind.__module__.startswith("torch.nn.")
    norm = isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm))
    ours = {} if norm else {k: v for k, v in vars(module).items() if k not in _OF_TORCH}
    ours = {k: v for k, v in ours.items() if not k.startswith(("_aspp_ext", "_fsdp"))}
    objects = {
        k: {name: v for name, v in vars(o).items() if _is_plain(v)}
        for k, o in ours.items()
        if not _is_plain(o) and hasattr(o, "__dict__") and not isinstance(o, (nn.Module, type))
    }
    return Snapshot(
        kind,
        None if torch_s else written(kind),
        tuple((k, v) for k, v in ours.items() if _is_plain(v)),
        tuple((k, tuple(inner.items())) for k, inner in objects.items() if inner),
        tuple(children),
    )


def check(module: nn.Module, known: Snapshot, path: str = "") -> None:
    """Raises Unfusable, naming what is another than it was; below the module itself, hooks too."""
    if path:
        part(module, path, known.kind)
    if known.written is None:
        check_classes(known.kind)
    elif written(known.kind) is not known.written:
        raise Unfusable(f"a method of {known.kind.__name__}, or what it reads, is replaced")
    where = path or "the module"
    if tuple(module._modules) != tuple(name for name, _ in known.children):
        raise Unfusable(f"{where} has other parts than it had: fuse it again")
    for name, value in known.settings:
        if _differs(getattr(module, name, None), value):
            raise Unfusable(f"{name} of {where} has changed: fuse it again")
    for name, settings in known.objects:
        owner = getattr(module, name, None)
        for setting, value in settings:
            if _differs(getattr(owner, setting, None), value):
                raise Unfusable(f"{name}.{setting} of {where} has changed: fuse it again")
    for name, child in known.children:
        if child is not None:
            found = module._modules[name]
            if found is None:
                raise Unfusable(f"{where} has no {name} any more: fuse it again")
            check(found, child, f"{path}.{name}" if path else name)


_SIMPLE = (bool, int, float, complex, str, bytes, type(None))
_AS_THEY_ARE = (type, types.FunctionType, types.BuiltinFunctionType)


def _is_plain(value: Any) -> bool:
    if type(value) in (tuple, list):
        return len(value) < 64 and all(type(v) in _SIMPLE for v in value)
    return type(value) in _SIMPLE or isinstance(value, _AS_THEY_ARE)


def _differs(value: Any, known: Any) -> bool:
    return type(value) is not type(known) or value != known
