# SPDX-License-Identifier: BSD-3-Clause
"""Cases in a process of their own, which may crash or hang without the others.

A child is a fork of this process, which has imported everything and touched no device, and computes
one case after the other until one of them goes wrong in a way that it may not survive.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
Beat = Callable[[str], None]
"""To be called with what is done next: who does not for long hangs, who is only slow does."""
Work = Callable[[T, Beat], dict[str, Any]]
BROKEN = "broken"
"""A key of a result: the child that gave it can compute nothing any more."""
_FORK = multiprocessing.get_context("fork")
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


def _leave_with(parent: int) -> None:
    """Ends this process when its parent ends, even by SIGKILL."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


class Child:
    """Computes ``work`` of what it is given; what it prints is in ``output``."""

    def __init__(self, work: Work[Any]) -> None:
        self.doing = ""
        self.output = tempfile.TemporaryFile()  # noqa: SIM115
        self.connection, far = _FORK.Pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        arguments = (work, far, os.getpid())
        self.process = _FORK.Process(target=self._serve, args=arguments, daemon=True)
        self.process.start()
        assert self.process.pid is not None
        self.pid: int = self.process.pid
        far.close()

    def _serve(self, work: Work[Any], connection: Any, parent: int) -> None:
        os.setsid()  # a kill of the group takes a compiler along
        _leave_with(parent)
        self.connection.close()
        for number in (1, 2):
            os.dup2(self.output.fileno(), number)
        faulthandler.enable(file=2)
        faulthandler.register(signal.SIGUSR1, file=2)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the parent ends its children
        while True:
            try:
                given = connection.recv()
            except EOFError:
                os._exit(0)
            result = work(given, lambda doing: connection.send_bytes(json.dumps(doing).encode()))
            connection.send_bytes(json.dumps(result).encode())

    def ask(self, given: Any, quiet: float, deadline: float) -> dict[str, Any] | None:
        """Its result; None where it was quiet for so many seconds, or the deadline has come.

        Raises:
            EOFError: the process has ended.
        """
        self.doing = ""
        try:
            self.connection.send(given)
            while self.connection.poll(max(0.0, min(quiet, deadline - time.monotonic()))):
                said = json.loads(self.connection.recv_bytes())
                if isinstance(said, dict):
                    return said
                self.doing = str(said)
        except (OSError, ValueError) as error:
            raise EOFError from error
        return None

    def tell_where(self) -> None:
        """Lets it print where it is, if it still can."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
            time.sleep(0.2)

    def end(self) -> str:
        """Kills it, if it is there; returns how it had ended, or an empty string."""
        if self.connection.closed:
            return ""
        self.process.join(0.5 if self._has_closed() else 0)
        code = self.process.exitcode
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.kill()  # which may not have a group of its own yet
        self.process.join()
        self.connection.close()
        if code is None:
            return ""
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
        return f"exit status {code}"

    def _has_closed(self) -> bool:
        try:
            return self.connection.poll(0)
        except OSError:
            return True

    def last_words(self, most: int = 4000) -> str:
        """The end of what it has printed."""
        size = self.output.seek(0, os.SEEK_END)
        self.output.seek(max(0, size - most))
        return self.output.read().decode(errors="replace")


def run(
    cases: Iterable[T],
    work: Work[T],
    quiet: float,
    deadline: float,
    alike: Callable[[T], Any] = lambda case: None,
) -> Iterator[tuple[T, dict[str, Any]]]:
    """Each case with its result, as long as the time lasts.

    Where there is none: ``{"result": "crashed" or "hung", "why": ..., "output": ...}``.

    Args:
        quiet: seconds without a beat, after which a case hangs.
        deadline: on ``time.monotonic()``'s clock; a case that runs then is left out.
        alike: cases of which it differs are given to different children.
    """
    child: Child | None = None
    kind: Any = None
    try:
        for case in cases:
            if time.monotonic() >= deadline:
                return
            if child is not None and alike(case) != kind:
                child.end()
                child = None
            kind = alike(case)
            child = child or Child(work)
            began = time.monotonic()
            try:
                result = child.ask(case, quiet, deadline)
            except EOFError:
                result = _bad("crashed", child.end(), child)
            if result is None:
                if time.monotonic() >= deadline:
                    return
                child.tell_where()
                child.end()
                result = _bad("hung", f"quiet for {quiet:.0f} s", child)
            if result.pop(BROKEN, False):
                child.end()
                child = None
            yield case, {**result, "seconds": round(time.monotonic() - began, 3)}
    finally:
        if child is not None:
            child.end()


def _bad(result: str, how: str, child: Child) -> dict[str, Any]:
    where = f", at {child.doing}" if child.doing else ""
    return {"result": result, "why": how + where, "output": child.last_words(), BROKEN: True}
