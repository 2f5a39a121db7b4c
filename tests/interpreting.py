# SPDX-License-Identifier: BSD-3-Clause
"""Triton's interpreter, in a process where it runs the kernels: quicker, or stricter."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any


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
    looked at; and each call of a device function redirects the language anew, which the launch has.
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


@contextlib.contextmanager
def overflow_refused() -> Iterator[None]:
    """An error where a sum or a product of integers has more digits than its type."""
    before = _set_options(sanitize_overflow=True, debug=True)
    try:
        yield
    finally:
        _set_options(**dataclasses.asdict(before))
