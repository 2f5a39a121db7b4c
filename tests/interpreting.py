# SPDX-License-Identifier: BSD-3-Clause
"""Triton's interpreter, in a process where it runs the kernels: quicker, or stricter."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def _set_options(**changed: Any) -> Any:
    """Returns the options that it had."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    before = builder.options
    builder.options = dataclasses.replace(before, **changed)
    return before


def quicken() -> None:
    """Leaves out what changes no result.

    Sums and products of integers are computed twice to look for an overflow, which is then not
    looked at; each call of a device function redirects the language anew, which the launch has; and
    a launch copies the memory of its arguments back to where it is.
    """
    from triton import language
    from triton.runtime import interpreter

    _set_options(sanitize_overflow=False)
    redirect, modules = interpreter._patch_lang, (language, language.core)

    def redirect_once(function: Any) -> Any:
        seen = (v for v in function.__globals__.values() if any(v is m for m in modules))
        if any(language.core.is_builtin(module.load) for module in seen):
            return redirect(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = redirect_once
    interpreter.GridExecutor._restore_args_dev = lambda *_: None


@contextlib.contextmanager
def overflow_refused() -> Iterator[None]:
    """An error where a sum or a product of integers has more digits than its type."""
    before = _set_options(sanitize_overflow=True, debug=True)
    try:
        yield
    finally:
        _set_options(**dataclasses.asdict(before))


class _Memory:
    """Of a launch: the elements of the tensors that share a storage, in steps of two bytes."""

    def __init__(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> None:
        self.begin, self.end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        self.dtype, self.own = dtype, np.zeros(storage.nbytes() // 2, bool)

    def add(self, t: Tensor) -> None:
        size = t.element_size() // 2
        first, strides = self.own[t.storage_offset() * size :], [s * size for s in t.stride()]
        np.lib.stride_tricks.as_strided(first, [*t.shape, size], [*strides, 1])[...] = True

    def has(self, pointers: np.ndarray, size: int) -> bool:
        if pointers.min() < self.begin or pointers.max() + size > self.end:
            return False
        places = (pointers.astype(np.int64) - self.begin) // 2
        return all(self.own[places + i].all() for i in range(size // 2))

    def holds_nan(self, loaded: np.ndarray) -> bool:
        values = torch.from_numpy(loaded.view(np.uint8)).view(self.dtype)
        return self.dtype.is_floating_point and bool(values.isnan().any())


def _memory_of(arguments: Any) -> list[_Memory]:
    found: dict[int, _Memory] = {}
    for t in (t for t in tree_leaves(arguments) if isinstance(t, Tensor)):
        storage = t.untyped_storage()
        found.setdefault(storage.data_ptr(), _Memory(storage, t.dtype)).add(t)
    return list(found.values())


@contextlib.contextmanager
def strange_memory_refused() -> Iterator[None]:
    """An error where a kernel touches what is no element of a tensor that it was given, or reads a
    NaN: where the arguments have none that is memory nobody has written, which tests poison."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__
    of_launch: list[_Memory] = []

    def lanes_and_memory(pointers: Any, mask: Any) -> tuple[np.ndarray, _Memory | None]:
        """The lanes that are not masked, if any, and what they are a part of."""
        lanes = np.broadcast_to(mask.data, pointers.data.shape)
        touched = pointers.data[lanes]
        if not touched.size:
            return lanes, None
        own = next((m for m in of_launch if m.begin <= touched[0] < m.end), None)
        size = pointers.get_element_ty().primitive_bitwidth // 8
        is_own = own is not None and own.has(touched, size)
        assert is_own, "no element of a tensor of the launch"
        return lanes, own

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        lanes, own = lanes_and_memory(pointers, mask)
        loaded = load(self, pointers, mask, *rest)
        assert own is None or not own.holds_nan(loaded.data[lanes]), "memory nobody has written"
        return loaded

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        lanes_and_memory(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def checked_call(self: Any, *arguments: Any, **named: Any) -> None:
        of_launch[:] = _memory_of((arguments, named))
        call(self, *arguments, **named)

    with (
        mock.patch.object(builder, "create_masked_load", checked_load),
        mock.patch.object(builder, "create_masked_store", checked_store),
        mock.patch.object(executor, "__call__", checked_call),
    ):
        yield
