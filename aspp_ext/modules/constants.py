# SPDX-License-Identifier: BSD-3-Clause
"""What Python may hold, remembered so that a later look tells whether it is the same.

Numbers, strings and the like are the same by type and value; so are containers and anybody's
objects, by what is in them. What cannot be looked into is the same by identity.
"""

from __future__ import annotations

import argparse
import array
import collections
import enum
import fractions
import functools
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LARGEST = 4096  # of values that one module, or one module's code, may read
_ARRAY = 1 << 14  # bytes of an array

_OF_TORCH = frozenset(vars(nn.Module()))
_FOREIGN = frozenset(("torch", "numpy", "aspp_ext", "builtins")) | sys.stdlib_module_names
VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_VALUES = (*VALUES, torch.Size, range, slice, fractions.Fraction, Decimal, enum.Enum)
_OBJECTS: tuple[type, ...] = (types.SimpleNamespace, argparse.Namespace, collections.UserDict)
_OBJECTS += (collections.UserList, collections.ChainMap)
_SEQUENCES = (list, tuple, collections.deque)
_PARTS: dict[type, tuple[str, ...]] = {
    functools.partial: ("func", "args", "keywords"),
    functools.partialmethod: ("func", "args", "keywords"),
    functools.cached_property: ("func",),
    types.MethodType: ("__func__", "__self__"),
    property: ("fget",),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
}


class Unseen(Exception):
    """Why what a name stands for cannot be remembered."""


class Missing:
    """Stands for what is not there."""


class Same:
    """An object that is the same by identity, in a copy of its owner the copy of it.

    In another process only of what a module has under its name this can be told.
    """

    def __init__(self, held: Any) -> None:
        self.held = held

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is that, or a function that is written and reads as it does."""
        return value is self.held or self.held is Missing or _are_alike(value, self.held)

    def __repr__(self) -> str:
        return f"{id(self.held)}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Same:
        copied = memo.get(id(self.held), self.held)
        return self if copied is self.held else Same(copied)

    def __reduce__(self) -> Any:
        home = sys.modules.get(getattr(self.held, "__module__", None) or "")
        found = getattr(home, getattr(self.held, "__qualname__", ""), Missing)
        return Same, (self.held if found is self.held else Missing,)


class Constant(NamedTuple):
    """A value as it was."""

    kind: type
    how: str
    value: Any = None
    items: tuple[Constant, ...] = ()
    names: tuple[str, ...] = ()
    attributes: tuple[Constant, ...] = ()


def is_foreign(home: Any) -> bool:
    """Whether a module of this name is Python's, PyTorch's, numpy's or ours."""
    return str(home).partition(".")[0] in _FOREIGN


@functools.cache
def is_installed(top: str) -> bool:
    """Whether a package of this name was installed, and is nobody's work of today."""
    module = sys.modules.get(top)
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any("site-packages" in str(p) or "dist-packages" in str(p) for p in places)


def kind_of(value: Any) -> type:
    """Its class, of what is fused the original."""
    kind = type(value)
    return getattr(kind, "original", kind) if isinstance(value, nn.Module) else kind


class Look:
    """Remembers values, and gathers the functions and classes that it meets in them."""

    def __init__(self) -> None:
        self.met: list[Any] = []
        self.left = LARGEST
        self._around: set[int] = set()  # ids of what is being looked into

    def at(self, value: Any) -> Constant:
        """The value as it is.

        Raises:
            Unseen: it is too large, or does not show what it would give next.
        """
        self.left -= 1
        if self.left < 0:
            raise Unseen("is too large to be watched")
        kind = kind_of(value)
        if isinstance(value, _VALUES) or _is_numpy(value, "generic"):
            return Constant(kind, "value", value)
        if isinstance(value, (types.FunctionType, type)):
            self.met.append(value)
            return _same(value)
        if id(value) in self._around:
            return Constant(kind, "around")
        for how, is_of, read in _READ:
            if is_of(value):
                return Constant(kind, how, read(value))
        if isinstance(value, Tensor):  # which is no constant
            return _same(value)
        if isinstance(value, (set, frozenset)):
            return Constant(kind, "set", frozenset(value))
        if hasattr(kind, "__next__") and is_foreign(kind.__module__):
            raise Unseen("is an iterator, which cannot be watched")
        self._around.add(id(value))
        left = self.left
        try:
            return self._into(kind, value)
        except Unseen:
            if not is_installed(kind.__module__.partition(".")[0]):
                raise
            self.left = left  # a logger, for instance
            return _same(value)
        finally:
            self._around.discard(id(value))

    def _into(self, kind: type, value: Any) -> Constant:
        attributes = dict(_attributes(value))
        if not is_foreign(kind.__module__):
            self.met.append(kind)
        held = (tuple(attributes), tuple(map(self.at, attributes.values())))
        if isinstance(value, (dict, types.MappingProxyType)):
            return Constant(kind, "dict", tuple(value), tuple(map(self.at, value.values())), *held)
        if isinstance(value, _SEQUENCES):
            return Constant(kind, "sequence", None, tuple(map(self.at, value)), *held)
        if is_foreign(kind.__module__) and not attributes and type(value) not in _OBJECTS:
            if (inner := getattr(value, "__dict__", {}).get("__wrapped__")) is not None:
                self.met.append(inner)
            return _same(value)
        # Pickle does not know the class of methods.
        kind = object if kind is types.MethodType else kind
        return Constant(kind, "object", None, (), *held)


def _same(value: Any) -> Constant:
    return Constant(object, "same", Same(value))


def difference(value: Any, known: Constant) -> str | None:
    """Where in it a value is another than it was: ``".rates[0]"``, or ``""`` as a whole."""
    kind, how, was, items, names, attributes = known
    if kind is not object and kind_of(value) is not kind:
        return ""
    if how == "value":
        return None if is_same(value, was) else ""
    if how == "same":
        return None if was.holds(value) else ""
    if how == "set":
        return None if value == was else ""
    if how == "dict":
        if tuple(value) != was:
            return ""
        for key, item in zip(was, items, strict=True):
            if (inner := difference(value[key], item)) is not None:
                return f"[{key!r}]{inner}"
    elif how == "sequence":
        if len(value) != len(items):
            return ""
        for i, item in enumerate(items):
            if (inner := difference(value[i], item)) is not None:
                return f"[{i}]{inner}"
    elif how in _AGAIN:
        # Compiled code has what it was compiled with.
        return None if torch.compiler.is_compiling() or _AGAIN[how](value) == was else ""
    if names or how == "object":
        compiling = torch.compiler.is_compiling()  # by what does not follow the code below
        found = {} if compiling else dict(_attributes(value))
        if not compiling and len(found) != len(names):
            return ""
        for name, attribute in zip(names, attributes, strict=True):
            got = getattr(value, name, Missing) if compiling else found.get(name, Missing)
            if (inner := difference(got, attribute)) is not None:
                return f".{name}{inner}"
    return None


def leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """What is in a value, and where in it; nothing, if that is not seen."""
    try:
        known = Look().at(value)
    except Unseen:
        return
    around = [("", known)]
    while around:
        path, inner = around.pop()
        yield path, (inner.kind, inner.how, repr(inner.value), len(inner.items), inner.names)
        around += [(f"{path}[{i}]", item) for i, item in enumerate(inner.items)]
        pairs = zip(inner.names, inner.attributes, strict=True)
        around += [(f"{path}.{name}", attribute) for name, attribute in pairs]


def is_settled(known: Constant) -> bool:
    """Whether the same object is always the same value."""
    if known.how == "sequence" and issubclass(known.kind, tuple):
        return not known.names and all(map(is_settled, known.items))
    return known.how in ("value", "same") or known.kind is frozenset


def is_same(value: Any, known: Any) -> bool:
    """Whether two of one class have the same value: zeros of other signs do not."""
    if value is known:
        return True
    if value != known:
        return bool(value != value and known != known)
    return isinstance(value, str) or bool(value) or repr(value) == repr(known)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """Of an object that is looked into."""
    kind: Any = type(value)
    if (parts := _PARTS.get(kind)) is not None:
        yield from ((name, getattr(value, name, Missing)) for name in parts)
    elif isinstance(value, nn.Module):
        has_none = next(itertools.chain(value.parameters(), value.buffers()), None) is None
        # Of one with parameters, a parent for instance, not all that is in it.
        for name, held in (*vars(value).items(), *(value._modules.items() if has_none else ())):
            ours = name.startswith("_aspp_ext") or (name == "training" and not has_none)
            if (name not in _OF_TORCH or name == "training") and not ours:
                yield name, held
    elif kind in _OBJECTS or not is_foreign(kind.__module__):
        yield from getattr(value, "__dict__", {}).items()
        for name in _slots(kind):
            try:
                yield name, object.__getattribute__(value, name)
            except AttributeError:
                yield name, Missing


@functools.cache
def _slots(kind: Any) -> tuple[str, ...]:
    found: list[str] = []
    for base in kind.__mro__:
        if not is_foreign(base.__module__):
            slots = vars(base).get("__slots__", ())
            found += [slots] if isinstance(slots, str) else slots
    return tuple(n for n in dict.fromkeys(found) if n not in ("__dict__", "__weakref__"))


def _is_numpy(value: Any, name: str) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, getattr(numpy, name, ()))


def _is_array(value: Any) -> bool:
    return isinstance(value, (bytearray, array.array)) or _is_numpy(value, "ndarray")


def _array(value: Any) -> Any:
    if getattr(value, "nbytes", 0) > _ARRAY or getattr(value, "dtype", "") == "O":
        raise Unseen("is too large to be watched")
    form = str(getattr(value, "dtype", "")), getattr(value, "shape", ())
    return *form, value.tobytes() if hasattr(value, "tobytes") else bytes(value)


_READ: tuple[tuple[str, Callable[[Any], bool], Callable[[Any], Any]], ...] = (
    ("array", _is_array, _array),
    ("count", lambda value: type(value) is itertools.count, repr),
)
_AGAIN = {how: read for how, _, read in _READ}


def _are_alike(value: Any, known: Any) -> bool:
    """Whether two functions are of one text and of one module, as those of a module that has been
    loaded again."""
    if not (isinstance(value, types.FunctionType) and isinstance(known, types.FunctionType)):
        return False
    if value.__code__ != known.__code__ or value.__globals__ is not known.__globals__:
        return False
    given = ((f.__defaults__, f.__kwdefaults__) for f in (value, known))
    one, other = given
    return not (value.__closure__ or known.__closure__) and repr(one) == repr(other)
