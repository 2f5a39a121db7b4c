# SPDX-License-Identifier: BSD-3-Clause
"""Whether a layer still computes what its class was written to compute.

People replace methods, of one instance or of a class, before or after ``fuse``: wrap-around padding
of a Conv2d's ``_conv_forward``, a BatchNorm2d.forward that logs, a counting ``F.conv2d``; or only
the code in them, as reloaders do. The fused path would pass them by without a word.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# Methods on the way from calling a module to its result. PyTorch's tracers replace the first ones
# for a while, by functions that call what was there.
CALLING = ("__call__", "_wrapped_call_impl", "_call_impl", "__getattr__")
ON_THE_WAY = (*CALLING, "forward", "_conv_forward", "_check_input_dim", "__iter__")
_TRACERS = ("torch.fx.", "torch.export.", "torch._export.", "torch.onnx.", "torch.jit.")

# What the layers call in turn, in torch.nn.functional.
_LAYERS = ("conv2d", "batch_norm", "relu", "adaptive_avg_pool2d", "interpolate")
_FUNCTIONS = (*_LAYERS, "_verify_batch_size")  # of a batch of one

# What those call.
_OPERATORS = ("batch_norm", "relu", "relu_", "cat")
_BUILTINS = ("adaptive_avg_pool2d", "upsample_bilinear2d")
_CALLED = ((F, _FUNCTIONS), (torch, _OPERATORS), (torch._C._nn, _BUILTINS))

# class or module -> functions that were found to be the author's own, and their code. What differs
# from it later is not the author's, though a reloader makes it look so.
_Known = tuple[list[Any], tuple[tuple[types.FunctionType, types.CodeType], ...]]
_known: dict[Any, _Known] = {}


def known_when_compiling(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.assume_constant_result``, which would import the compiler for it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def guard(owner: Any, names: tuple[str, ...]) -> None:
    """Lets Dynamo compile again once one of these is replaced: it guards what it sees compared."""
    for name in names:
        _ = getattr(owner, name) is None


@known_when_compiling
def guarded(kind: type) -> tuple[str, ...]:
    """Of what Dynamo reads as Python does, what a class has: absence is guarded slowly."""
    return tuple(name for name in ON_THE_WAY if hasattr(kind, name))


def changed_methods(module: nn.Module) -> list[str]:
    """The names of the methods that are replaced on the instance."""
    if torch.compiler.is_compiling():
        guard(module, guarded(type(module)))
    return _methods_among(type(module), *module.__dict__)


@known_when_compiling
def _methods_among(kind: type, *names: str) -> list[str]:
    methods = _methods(kind)
    return [] if methods.isdisjoint(names) else sorted(methods.intersection(names))


@functools.cache
def _methods(kind: Any) -> frozenset[str]:
    names = set(dir(kind)) - {"original"}  # a fused class's, which is no method
    return frozenset(name for name in names if callable(getattr(kind, name, None)))


def changed_class(kind: type[nn.Module]) -> str | None:
    """The name of a method of the class, or of a class above it, that is not its author's."""
    if torch.compiler.is_compiling():
        guard(kind, guarded(kind))
    return _changed_class(kind)


@known_when_compiling
def _changed_class(kind: type[nn.Module]) -> str | None:
    # And what the methods know as F.
    home = sys.modules.get(kind.__module__)
    for name, module in (("F", F), ("torch", torch)):
        if getattr(home, name, module) is not module:
            return name
    if kind.__getattribute__ is not object.__getattribute__:
        return "__getattribute__"
    methods = [getattr(kind, name, None) for name in ON_THE_WAY]
    return _first_changed(kind, ON_THE_WAY, methods, functools.partial(_is_of_its_class, kind))


def is_tracers(function: Any) -> bool:
    home = getattr(function, "__globals__", {}).get("__name__")
    return f"{home}.".startswith(_TRACERS)


def changed_function() -> str | None:
    """The name of a function that the layers call and that is not PyTorch's."""
    if torch.compiler.is_compiling():
        guard(F, ("torch",))
        for module, names in _CALLED:
            guard(module, names)
    return _changed_function()


@known_when_compiling
def _changed_function() -> str | None:
    if vars(F).get("torch", torch) is not torch:
        return "torch.nn.functional.torch"
    for module, names in _CALLED:
        functions = [getattr(module, name) for name in names]
        name = _first_changed(module, names, functions, functools.partial(_is_in_module, module))
        if name is not None:
            return f"{module.__name__}.{name}"
    return None


def _first_changed(
    owner: Any, names: tuple[str, ...], functions: list[Any], is_own: Callable[[str, Any], bool]
) -> str | None:
    """The name of one that is not its author's: at the first look by where it was written, later
    by whether it is what it was then. What tracers put in front for a while counts for neither."""
    known, codes = _known.get(owner, (None, ()))
    if functions == known and all(f.__code__ is code for f, code in codes):
        return None
    of_tracers = [f for n, f in zip(names, functions, strict=True) if _is_of_a_tracer(n, f)]
    if known is None:
        for name, function in zip(names, functions, strict=True):
            if function not in of_tracers and not is_own(name, function):
                return name
        if not of_tracers:
            written = {f: f.__code__ for f in functions if isinstance(f, types.FunctionType)}
            _known[owner] = functions, tuple(written.items())
        return None
    code_of = dict(codes)
    for name, function, before in zip(names, functions, known, strict=True):
        same = function is before and getattr(function, "__code__", None) is code_of.get(function)
        if not same and function not in of_tracers:
            return name
    return None


def _is_in_module(module: types.ModuleType, name: str, function: Any) -> bool:
    if isinstance(function, types.BuiltinFunctionType):
        known = getattr(torch._C._VariableFunctions, name, None)
        return function is known or (function.__self__, function.__name__) == (module, name)
    return _is_written_in(function, module) and function.__name__ == name


def _is_of_its_class(kind: type, name: str, method: Any) -> bool:
    owner = next((base for base in kind.__mro__ if name in vars(base)), None)
    if owner is None:
        return True
    if owner.__module__.partition(".")[0] not in ("torch", kind.__module__.partition(".")[0]):
        return False  # put among its bases
    home = sys.modules.get(owner.__module__)
    if home is None or not _is_written_in(method, home, owner):
        return False
    # An alias, as Module.__call__ is of _wrapped_call_impl, has the other's name.
    return method.__qualname__.rpartition(".")[0] in ("", owner.__qualname__)


def _is_written_in(function: Any, home: types.ModuleType, owner: type | None = None) -> bool:
    """Not by its name, which functools.wraps passes on; nor with code from elsewhere in it."""
    if not isinstance(function, types.FunctionType):
        return False
    # Of an owner whose module was imported anew since, its own: that which has the class.
    has_owner = owner is not None and function.__globals__.get(owner.__name__) is owner
    if function.__globals__ is not vars(home) and not has_owner:
        return False
    code, file = function.__code__, getattr(home, "__file__", None)
    # Frozen programs have other folders and endings in one than in the other.
    of_file = file is None or Path(code.co_filename).stem == Path(file).stem
    return of_file and code.co_name == function.__name__


def _is_of_a_tracer(name: str, function: Any) -> bool:
    if name not in CALLING or not isinstance(function, types.FunctionType):
        return False
    return f"{function.__globals__.get('__name__')}.".startswith(_TRACERS)
