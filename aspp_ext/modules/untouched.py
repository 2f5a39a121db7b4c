# SPDX-License-Identifier: BSD-3-Clause
"""Whether a layer still computes what its class was written to compute.

People replace methods, of one instance or of a class, before or after ``fuse``: wrap-around padding
of a Conv2d's ``_conv_forward``, a BatchNorm2d.forward that logs, a counting ``F.conv2d``. The fused
path would pass them by without a word.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# Methods on the way from calling a module to its result. PyTorch's tracers replace the first ones
# for a while, by functions that call what was there.
_CALLING = ("__call__", "_wrapped_call_impl", "_call_impl", "__getattr__")
_ON_THE_WAY = (*_CALLING, "forward", "_conv_forward", "_check_input_dim", "__iter__")
# What the layers call in turn, in torch.nn.functional.
_LAYERS = ("conv2d", "batch_norm", "relu", "adaptive_avg_pool2d", "interpolate")
_FUNCTIONS = (*_LAYERS, "_verify_batch_size")  # of a batch of one

# What those call.
_OPERATORS = ("batch_norm", "relu", "relu_", "cat")

# class or module -> what was found to be the author's own
_known: dict[Any, list[Any]] = {}


def _known_when_compiling(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.assume_constant_result``, which would import the compiler for it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _guard(owner: Any, names: tuple[str, ...]) -> None:
    """Lets Dynamo compile again once one of these is replaced: it guards what it sees compared."""
    for name in names:
        _ = getattr(owner, name) is None


@_known_when_compiling
def _guarded(kind: type) -> tuple[str, ...]:
    """Of what Dynamo reads as Python does, what a class has: absence is guarded slowly."""
    return tuple(name for name in _ON_THE_WAY if hasattr(kind, name))


def changed_methods(module: nn.Module) -> list[str]:
    """The names of the methods that are replaced on the instance."""
    if torch.compiler.is_compiling():
        _guard(module, _guarded(type(module)))
    return _methods_among(type(module), *module.__dict__)


@_known_when_compiling
def _methods_among(kind: type, *names: str) -> list[str]:
    methods = _methods(kind)
    return [] if methods.isdisjoint(names) else sorted(methods.intersection(names))


@functools.cache
def _methods(kind: Any) -> frozenset[str]:
    return frozenset(name for name in dir(kind) if callable(getattr(kind, name, None)))


def changed_class(kind: type[nn.Module]) -> str | None:
    """The name of a method of the class, or of a class above it, that is not its author's."""
    if torch.compiler.is_compiling():
        _guard(kind, _guarded(kind))
    return _changed_class(kind)


@_known_when_compiling
def _changed_class(kind: type[nn.Module]) -> str | None:
    # And what the methods know as F.
    if getattr(sys.modules.get(kind.__module__), "F", F) is not F:
        return "F"
    methods = [getattr(kind, name, None) for name in _ON_THE_WAY]
    if methods == _known.get(kind):
        return None
    for name, method in zip(_ON_THE_WAY, methods, strict=True):
        if not _is_of_its_class(kind, name, method):
            return name
    _known[kind] = methods
    return None


def changed_function() -> str | None:
    """The name of a function that the layers call and that is not PyTorch's."""
    if torch.compiler.is_compiling():
        _guard(F, _FUNCTIONS)
        _guard(torch, _OPERATORS)
    return _changed_function()


@_known_when_compiling
def _changed_function() -> str | None:
    functions = [getattr(F, name) for name in _FUNCTIONS]
    functions += [getattr(torch, name) for name in _OPERATORS]
    if functions == _known.get(F):
        return None
    names = [f"torch.nn.functional.{name}" for name in _FUNCTIONS]
    names += [f"torch.{name}" for name in _OPERATORS]
    for name, function in zip(names, functions, strict=True):
        if not (isinstance(function, types.BuiltinFunctionType) or _is_written_in(function, F)):
            return name
    _known[F] = functions
    return None


def _is_of_its_class(kind: type, name: str, method: Any) -> bool:
    owner = next((base for base in kind.__mro__ if name in vars(base)), None)
    if owner is None:
        return True
    if name in _CALLING and _is_of_pytorch(method):
        return True
    home = sys.modules.get(owner.__module__)
    if home is None or not _is_written_in(method, home):
        return False
    # An alias, as Module.__call__ is of _wrapped_call_impl, has the other's name.
    return method.__qualname__.rpartition(".")[0] in ("", owner.__qualname__)


def _is_written_in(function: Callable[..., Any], home: types.ModuleType) -> bool:
    """Not by its name, which functools.wraps passes on."""
    return isinstance(function, types.FunctionType) and function.__globals__ is vars(home)


def _is_of_pytorch(function: Any) -> bool:
    if not isinstance(function, types.FunctionType):
        return False
    return str(function.__globals__.get("__name__")).startswith("torch.")
