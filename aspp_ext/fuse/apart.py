# SPDX-License-Identifier: BSD-3-Clause
"""Looking at one thread alone, where Python and PyTorch only have switches for the process.

Another thread may train meanwhile. What of it is replaced here passes it by; what cannot be kept
from it, while a module is read: warnings are ignored, the default random generators draw other
numbers and are put back afterwards, deterministic algorithms are off if they were on, and
``torch.export`` puts functions of its own in the place of some of ``nn.Module``'s.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """``function``, which calls what was there, in the place of ``owner``'s. If somebody has put
    something around it by the end, that stays."""
    plain = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if vars(owner).get(name) is function:
            setattr(owner, name, plain)


class _Muted:
    """``sys.stderr``, of all threads but one."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._here = stream, threading.get_ident()

    def write(self, text: str) -> int:
        muted = threading.get_ident() == self._here
        return len(text) if muted else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Meanwhile this thread writes nothing to ``sys.stderr``, and PyTorch logs nothing of it."""
    here = threading.get_ident()

    def is_heard(record: logging.LogRecord) -> bool:
        return record.thread != here or record.name.partition(".")[0] != "torch"

    named = [
        logger for name, logger in [*logging.root.manager.loggerDict.items()] if "torch" in name
    ]
    loggers = [x for x in (logging.root, *named) if isinstance(x, logging.Logger)]
    handlers = {handler for logger in loggers for handler in logger.handlers}
    handlers.update([] if logging.lastResort is None else [logging.lastResort])
    for handler in handlers:
        handler.addFilter(is_heard)
    stream, muted = sys.stderr, _Muted(sys.stderr)
    sys.stderr = muted
    try:
        yield
    finally:
        if sys.stderr is muted:
            sys.stderr = stream
        for handler in handlers:
            handler.removeFilter(is_heard)
