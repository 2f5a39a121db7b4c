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
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
Beat = Callable[..., None]
"""``beat(doing="", patience=1)``, to be called with what is done next, if that is not the same, and
how many times as long it may be quiet as a kernel of ours, which hangs then."""
Work = Callable[[T, Beat], dict[str, Any]]
_NO_MORE: Any = object()
CUT = "cut"
"""The result of a case that the deadline ended."""
BROKEN, FINAL = "broken", "final"
"""Keys of a result: the child that gave it can compute nothing any more; and it would be the same
another time."""
MOST_S = 10.0
"""That a process may take to end."""
COMPILING, PYTORCH = 3, 6
"""Patience with a call that may compile its kernel first; and with what is not ours, also the start
of a process."""
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
        self.doing, self.patience, self.heard = "", PYTORCH, time.monotonic()
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

            def beat(doing: str = "", patience: int = 1) -> None:
                connection.send_bytes(json.dumps([doing, patience]).encode())

            connection.send_bytes(json.dumps(work(given, beat)).encode())

    def give(self, given: Any) -> None:
        """Begins with the next; one that has ended is found out by :meth:`hear`."""
        self.doing, self.patience, self.heard = "", PYTORCH, time.monotonic()
        with contextlib.suppress(OSError):
            self.connection.send(given)

    def hear(self) -> dict[str, Any] | None:
        """The result, or None where it was a beat.

        Raises:
            EOFError: the process has ended.
        """
        try:
            said = json.loads(self.connection.recv_bytes())
        except (OSError, ValueError) as error:
            raise EOFError from error
        self.heard = time.monotonic()
        if isinstance(said, dict):
            return said
        self.doing, self.patience = said[0] or self.doing, said[1]
        return None

    def result(self, quiet: float) -> dict[str, Any] | None:
        """What it has to say by now: also that it crashed or, being quiet for so long, hangs."""
        ended = self.process.exitcode is not None
        try:
            if self.connection.poll(0):
                return self.hear()
        except (EOFError, OSError):
            self.process.join(MOST_S)  # as it has closed its end it is about to end
            ended = True
        if ended:  # though a child of its own may have the connection
            return self._bad("crashed", self.end())
        seconds = self.patience * quiet
        if time.monotonic() - self.heard < seconds:
            return None
        self.tell_where()
        self.end()
        if self.patience < PYTORCH:
            return self._bad("hung", f"quiet for {seconds:.0f} s")
        return {**self._bad("unavailable", f"PyTorch takes {seconds:.0f} s"), FINAL: True}

    def _bad(self, result: str, how: str) -> dict[str, Any]:
        where = f", at {self.doing}" if self.doing else ""
        return {"result": result, "why": how + where, "output": self.last_words(), BROKEN: True}

    def tell_where(self) -> None:
        """Lets it print where it is, if it still can."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
            time.sleep(0.2)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.kill()  # which may not have a group of its own yet

    def end(self) -> str:
        """Kills it, if it is there; returns how it had ended, or an empty string."""
        if self.connection.closed:
            return ""
        code = self.process.exitcode
        self.kill()
        self.process.join(MOST_S)  # a driver may hold it for ever
        self.connection.close()
        if code is None:
            return ""
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
        return f"exit status {code}"

    def last_words(self, most: int = 4000) -> str:
        """The end of what it has printed."""
        size = self.output.seek(0, os.SEEK_END)
        self.output.seek(max(0, size - most))
        return self.output.read().decode(errors="replace")


def ask(work: Work[T], given: T, quiet: float) -> dict[str, Any]:
    """The result of one case."""
    ((_, result),) = run([given], work, quiet, float("inf"))
    return result


def run(
    cases: Iterable[T],
    work: Work[T],
    quiet: float,
    deadline: float,
    alike: Callable[[T], Any] = lambda case: None,
    at_once: int = 1,
) -> Iterator[tuple[T, dict[str, Any]]]:
    """Each case with its result, as long as the time lasts.

    Where there is none: ``{"result": "crashed" or "hung", "why": ..., "output": ...}``.

    Args:
        cases: the next one is asked for when a child is free, its results so far being known.
        quiet: seconds without a beat, after which a case hangs.
        deadline: on ``time.monotonic()``'s clock; the result of cases that run then is CUT.
        alike: cases of which it differs are given to different children.
        at_once: so many children.
    """
    waiting, busy, free = iter(cases), {}, []  # type: ignore[var-annotated]
    try:
        while time.monotonic() < deadline:
            while len(busy) < at_once and (case := next(waiting, _NO_MORE)) is not _NO_MORE:
                kind = alike(case)
                child = next((c for k, c in free if k == kind), None)
                for _, other in free:
                    if other is not child:
                        other.end()
                free, child = [], child or Child(work)
                child.give(case)
                busy[child] = (case, kind, time.monotonic())
            if not busy:
                return
            ends = min(deadline, *(child.heard + child.patience * quiet for child in busy))
            signs = [sign for c in busy for sign in (c.connection, c.process.sentinel)]
            multiprocessing.connection.wait(signs, max(0.0, ends - time.monotonic()))
            for child in list(busy):
                if (result := child.result(quiet)) is None:
                    continue
                case, kind, began = busy.pop(child)
                if result.pop(BROKEN, False):
                    child.end()
                else:
                    free.append((kind, child))
                yield case, {**result, "seconds": round(time.monotonic() - began, 3)}
        for case, _, began in [*busy.values()]:
            yield case, {"result": CUT, "seconds": round(time.monotonic() - began, 3)}
    finally:
        children = [*busy, *(child for _, child in free)]
        for child in children:
            child.kill()
        for child in children:
            child.end()
