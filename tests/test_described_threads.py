# SPDX-License-Identifier: BSD-3-Clause
"""Another thread at work while a model is read."""

from __future__ import annotations

import io
import logging
import sys
import threading
from typing import Any

import torch
from test_described import Head
from torch import nn

from aspp_ext.fuse import fuse, fuse_report
from aspp_ext.fuse.apart import replaced


class Notes(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.threads: list[int | None] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.threads.append(record.thread)


def test_what_another_thread_does_meanwhile(monkeypatch) -> None:
    logger, notes, stream = logging.getLogger("torch.of_a_test"), Notes(), io.StringIO()
    logger.addHandler(notes)
    logger.propagate = False
    monkeypatch.setattr(sys, "stderr", stream)
    before = nn.Module.__setattr__, torch.SymBool.__bool__
    begun, ended, count = threading.Event(), threading.Event(), 0

    def work() -> None:
        nonlocal count
        module = nn.Linear(2, 2)
        while not ended.is_set() and count < 100_000:
            count += 1
            module.step = count
            logger.warning("of another thread")
            print("of another thread", file=sys.stderr)
            begun.set()

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    ours = fuse(Head())
    ended.set()
    thread.join()
    assert [e.reason for e in fuse_report(ours)] == [None]
    assert notes.threads == [thread.ident] * count
    assert stream.getvalue().count("of another thread") == count
    assert (nn.Module.__setattr__, torch.SymBool.__bool__) == before


def test_what_somebody_puts_around_stays() -> None:
    class Owner:
        def call(self) -> list[str]:
            return ["plain"]

    plain = Owner.call

    def ours(self: Any) -> list[str]:
        return ["ours", *plain(self)]

    def theirs(self: Any) -> list[str]:
        return ["theirs", *ours(self)]

    with replaced(Owner, "call", ours):
        assert Owner().call() == ["ours", "plain"]
        Owner.call = theirs  # type: ignore[method-assign]
    assert Owner().call() == ["theirs", "ours", "plain"]
    Owner.call = plain  # type: ignore[method-assign]
    with replaced(Owner, "call", ours):
        pass
    assert Owner.call is plain
