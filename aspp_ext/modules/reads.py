# SPDX-License-Identifier: BSD-3-Clause
"""How classes of anybody's are written, and what their methods read: whether that has changed.

From the methods of a class all Python is followed by the names in it: functions in its and other
modules, their defaults and closures, properties, and the values that they find. Not followed is
Python's own, PyTorch's, numpy's and ours, nor installed packages that have none of the classes.
"""

from __future__ import annotations

import dis
import functools
import itertools
import sys
import types
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .constants import (
    LARGEST,
    Constant,
    Look,
    Missing,
    Same,
    Unseen,
    difference,
    is_foreign,
    is_installed,
    is_settled,
)
from .parts import Unfusable
from .untouched import CALLING, ON_THE_WAY, guard, guarded, is_tracers, known_when_compiling

# Which no forward calls.
_MAKING = frozenset(("__init__", "__init_subclass__", "__new__"))
_MAKING |= {
    "__deepcopy__",
    "__copy__",
    "__reduce__",
    "__reduce_ex__",
    "__getstate__",
    "__setstate__",
}


_SPECIAL = frozenset((*ON_THE_WAY, "__getattribute__"))  # which nobody has to name


class Names(NamedTuple):
    """What a function's text names."""

    globals_: frozenset[str]
    attributes: frozenset[str]  # of whatever, and strings, by which attributes are asked for
    imported: frozenset[str]


@functools.cache
def names_in(code: types.CodeType) -> Names:
    """The names in a function and those in it."""
    globals_: set[str] = set()
    attributes: set[str] = set()
    imported: set[str] = set()
    for step in dis.get_instructions(code):
        if step.opname.endswith(("_GLOBAL", "_NAME")) and step.opname != "IMPORT_NAME":
            globals_.add(step.argval)
        elif step.opname == "IMPORT_NAME":
            imported.add(step.argval)
        elif step.opname.endswith(("_ATTR", "_METHOD", "IMPORT_FROM")):
            attributes.add(step.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = names_in(constant)
            globals_ |= inner.globals_
            attributes |= inner.attributes
            imported |= inner.imported
        several = constant if isinstance(constant, (tuple, frozenset)) else (constant,)
        attributes.update(s for s in several if isinstance(s, str) and s.isidentifier())
    return Names(frozenset(globals_), frozenset(attributes), frozenset(imported))


class Place(NamedTuple):
    """Where a value is found by its name, and which it was."""

    owner: Mapping[str, Any]
    name: str
    value: Any
    constant: Constant | None  # None of what counts by itself
    changes: bool  # though it is the same object
    said: str


class Cell(NamedTuple):
    """A variable of a closure, and which value it had."""

    cell: types.CellType
    value: Any
    constant: Constant | None
    changes: bool
    said: str


class Text(NamedTuple):
    """A function as it was."""

    function: types.FunctionType
    code: types.CodeType
    given: tuple[Any, Any]  # its defaults
    constant: Constant | None
    changes: bool
    said: str


class Owner(NamedTuple):
    """A class or a module, of which what has a name is read."""

    held: Mapping[str, Any]
    said: str
    names: frozenset[str] | None  # None: all that any function has


class Written:
    """How classes and functions were written, and what those read, at some time.

    In another process it is how they are written there.
    """

    def __init__(self, roots: tuple[Any, ...]) -> None:
        reader = _Reader(roots)
        self.roots, self.names = roots, frozenset(reader.names)
        self.places, self.cells = list(reader.places.values()), list(reader.cells.values())
        self.texts, self.orders = list(reader.texts.values()), list(reader.orders.items())
        owners = (o for o in reader.owners.values() if o.names is None)
        names = self.names | _SPECIAL
        self.absent = [(o.held.keys(), names - o.held.keys(), o.said) for o in owners]
        self.imported = reader.imported
        self.number = next(_numbers)
        _by_number[self.number] = self

    def change(self) -> str | None:
        """What has changed since, by its name."""
        for owner, name, value, constant, changes, said in self.places:
            found = owner.get(name, Missing)
            inner = _difference(found, value, constant) if found is not value or changes else None
            if inner is not None:
                return said + inner
        for function, code, given, constant, changes, said in self.texts:
            if function.__code__ is not code and function.__code__ != code:
                return said
            now = function.__defaults__, function.__kwdefaults__
            same = now[0] is given[0] and now[1] is given[1] and not changes
            if not same and (constant is None or difference(now, constant) is not None):
                return f"a default of {said}"
        for cell, value, constant, changes, said in self.cells:
            found = _content(cell)
            inner = _difference(found, value, constant) if found is not value or changes else None
            if inner is not None:
                return said + inner
        for kind, order in self.orders:
            if kind.__mro__ is not order:
                return kind.__name__
        for names, absent, said in self.absent:
            if not names.isdisjoint(absent):
                return said + min(names & absent)
        return None

    def imports(self) -> str | None:
        """A module that a function imports, which had not been imported."""
        return next((name for name in self.imported if name in sys.modules), None)

    def change_now(self) -> str | None:
        """Either."""
        return self.change() or self.imports()

    def __deepcopy__(self, memo: Any) -> Written:
        return self

    def __reduce__(self) -> Any:
        return _there, (self.roots,)


class _Lost(Written):
    """Of classes that cannot be watched where they are."""

    def change(self) -> str | None:
        return "something"


def _there(roots: tuple[Any, ...]) -> Written:
    try:
        return written(roots)
    except Unfusable:
        return _Lost(())


# What was written at some time, the last of it in the end: a patch may be taken back.
_written: dict[tuple[Any, ...], list[Written]] = {}
_by_number: weakref.WeakValueDictionary[int, Written] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_REMEMBERED = 16


def written(roots: Iterable[Any]) -> Written:
    """How classes and functions of anybody's are written now.

    Raises:
        Unfusable: they read what cannot be watched.
    """
    roots = tuple(dict.fromkeys(roots))
    history = _written.setdefault(roots, [])
    known = next((w for w in reversed(history) if not (w.imports() or w.change())), None)
    if known is None:
        known = Written(roots)
        history.append(known)
        del history[:-_REMEMBERED]
    return known


def change(known: Written) -> str | None:
    """What has changed since then, by its name."""
    if torch.compiler.is_compiling():
        for root in known.roots:
            if isinstance(root, type):
                guard(root, guarded(root))
        return _change(known.number)
    return known.change_now()


@known_when_compiling
def _change(number: int) -> str | None:
    return _by_number[number].change_now()


def _difference(found: Any, value: Any, constant: Constant | None) -> str | None:
    if constant is not None:
        return difference(found, constant)
    if value is Missing:
        return None if found is Missing else ""
    return None if Same(value).holds(found) else ""


def _top(home: Any) -> str:
    return str(home).partition(".")[0]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return Missing


class _Reader:
    """Follows the names from classes and functions."""

    def __init__(self, roots: tuple[Any, ...]) -> None:
        self.look = Look()
        self.names: set[str] = set()
        self.places: dict[tuple[int, str], Place] = {}
        self.texts: dict[types.FunctionType, Text] = {}
        self.cells: dict[int, Cell] = {}
        self.orders: dict[type, tuple[type, ...]] = {}
        self.owners: dict[tuple[int, frozenset[str] | None], Owner] = {}
        self.imported: list[str] = []  # what is not there yet
        self._followed: set[types.FunctionType] = set()
        kinds = [k for k in roots if isinstance(k, type) and issubclass(k, nn.Module)]
        self._homes = {_top(base.__module__) for kind in kinds for base in kind.__mro__}
        for root in roots:
            self._meet(root, root.__name__)
        size = None
        while size != (size := (len(self.places), len(self.names), len(self.owners))):
            if len(self.places) + len(self.texts) > LARGEST:
                raise Unfusable("its code reads too much to be watched")
            for (key, _), (held, said, names) in list(self.owners.items()):
                for name in held.keys() & (self.names if names is None else names):
                    # Of what is Python's or PyTorch's that it is there is all that counts.
                    follow = names is None or isinstance(held[name], types.ModuleType)
                    self._add(key, held, name, said + name, names, follow)
        for name in self.names:
            if hasattr(Tensor, name):  # which has most from above
                self._add(id(Tensor), vars(Tensor), name, f"Tensor.{name}", follow=False)

    def _is_others(self, home: Any) -> bool:
        top = _top(home)
        return is_foreign(top) or (top not in self._homes and is_installed(top))

    def _add(
        self,
        key: int,
        held: Mapping[str, Any],
        name: str,
        said: str,
        names: frozenset[str] | None = None,
        follow: bool = True,
    ) -> None:
        if (key, name) in self.places:
            return
        value = held.get(name, Missing)
        constant = self._meet(value, said, names) if follow else None
        changes = constant is not None and not is_settled(constant)
        self.places[key, name] = Place(held, name, value, constant, changes, said)

    def _meet(self, value: Any, said: str, names: frozenset[str] | None = None) -> Constant | None:
        """Follow a value; what of it is compared, of one that does not count by itself."""
        if isinstance(value, types.FunctionType):
            self._follow(value)
        elif isinstance(value, types.ModuleType):
            others = self._is_others(value.__name__)
            own, held = (names if others else None), vars(value)
            if not others or own is not None:
                self.owners.setdefault((id(held), own), Owner(held, f"{value.__name__}.", own))
        elif isinstance(value, type):
            self._class(value)
        elif value is not Missing and not isinstance(value, types.BuiltinFunctionType):
            try:
                constant = self.look.at(value)
            except Unseen as reason:
                raise Unfusable(f"it reads {said}, which {reason}") from reason
            met, self.look.met = self.look.met, []
            for inner in met:
                self._meet(inner, said)
            return constant
        return None

    def _class(self, kind: type) -> None:
        if kind in self.orders or self._is_others(kind.__module__):
            return
        self.orders[kind] = kind.__mro__
        self._class(type(kind))
        is_module = issubclass(kind, nn.Module)
        making = _MAKING if is_module else frozenset()
        for base in kind.__mro__:
            members, said = vars(base), f"{base.__name__}."
            own = not self._is_others(base.__module__)
            if own:
                self.owners.setdefault((id(base), None), Owner(members, said, None))
            for name, member in list(members.items()):
                if not isinstance(member, types.FunctionType) or is_tracers(member):
                    continue
                if not own:  # what is on the way from a call to its result
                    if is_module and name in ON_THE_WAY and name not in CALLING:
                        self._add(id(base), members, name, said + name, follow=False)
                        self._text(member)
                elif name == "forward" or (name[:2] == "__" and name not in making):
                    self._add(id(base), members, name, said + name)
                elif is_module:
                    self._text(member)

    def _text(self, function: types.FunctionType, follow: bool = False) -> None:
        if function in self.texts and not follow:
            return
        given = function.__defaults__, function.__kwdefaults__
        constant = self._meet(given, f"a default of {function.__name__}") if follow else None
        changes = constant is not None and not is_settled(constant)
        text = Text(function, function.__code__, given, constant, changes, function.__qualname__)
        self.texts[function] = text

    def _follow(self, function: types.FunctionType) -> None:
        if function in self._followed:
            return
        self._followed.add(function)
        held = function.__globals__
        if self._is_others(held.get("__name__")):  # perhaps around one of somebody's
            if (inner := vars(function).get("__wrapped__")) is not None:
                self._meet(inner, function.__name__)
            return
        self._text(function, follow=True)
        named = names_in(function.__code__)
        self.names |= named.attributes
        for name in named.imported:
            for full in (name, f"{held.get('__package__')}.{name}"):
                if (module := sys.modules.get(full)) is not None:
                    self._meet(module, full, named.attributes)
                elif not self._is_others(full):
                    self.imported.append(full)
        for name in named.globals_:
            if isinstance(held.get(name), types.ModuleType):
                self._meet(held[name], name, named.attributes)
            self._add(id(held), held, name, name, named.attributes)
        free = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in free:
            if id(cell) not in self.cells:
                value, said = _content(cell), f"{name} of {function.__qualname__}"
                constant = self._meet(value, said, named.attributes)
                changes = constant is not None and not is_settled(constant)
                self.cells[id(cell)] = Cell(cell, value, constant, changes, said)
