# SPDX-License-Identifier: BSD-3-Clause
"""A forward that leaves something behind, wherever that is, is left as it is."""

from __future__ import annotations

import collections
import itertools
import random
import types
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import constants_elsewhere as elsewhere
import numpy
import pytest
import torch
from torch import Tensor, nn

from aspp_ext.fuse import fuse, fuse_report


class Counter:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


SEEN: list[Any] = []
BY_NAME: dict[str, Any] = {"calls": 0}
OBJECT = types.SimpleNamespace(calls=0, inner=types.SimpleNamespace(calls=[]))
COUNTER = Counter()
NUMBERS = itertools.count()
LAST: Any = None


class Base(nn.Module):
    shared: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(16, 4, 3, padding=r, dilation=r) for r in (1, 2, 3))
        self.mix = nn.Conv2d(12, 4, 1)
        self.queue, self.counter = collections.deque([0], maxlen=1), Counter()
        self.random, self.numbers = random.Random(0), numpy.random.default_rng(0)
        self.nested = {"a": [types.SimpleNamespace(calls=0)]}

    def forward(self, x: Tensor) -> Tensor:
        self.note(x)
        return self.mix(torch.cat([b(x) for b in self.branches], 1))


def keep_last(x: Tensor) -> None:
    global LAST
    LAST = x


def counting() -> Callable[[], int]:
    calls = 0

    def count() -> int:
        nonlocal calls
        calls += 1
        return calls

    return count


count = counting()


def with_default(x: Tensor, seen: list[Any] = []) -> None:  # noqa: B006
    seen.append(x.shape)


def add(owner: Any, name: str) -> None:
    setattr(owner, name, getattr(owner, name) + 1)


NOTES: dict[str, tuple[Callable[[Any, Tensor], object], str]] = {
    "deque": (lambda s, x: s.queue.append(len(s.queue) + s.queue[0]), "queue"),
    "its own generator": (lambda s, x: s.random.random(), "random"),
    "its own of numpy": (lambda s, x: s.numbers.random(), "numbers"),
    "object with slots": (lambda s, x: add(s.counter, "calls"), "counter.calls"),
    "nested": (lambda s, x: add(s.nested["a"][0], "calls"), "nested"),
    "global list": (lambda s, x: SEEN.append(x.shape), "SEEN"),
    "global dict": (lambda s, x: BY_NAME.update(calls=BY_NAME["calls"] + 1), "BY_NAME"),
    "global object": (lambda s, x: add(OBJECT, "calls"), "OBJECT.calls"),
    "nested global": (lambda s, x: OBJECT.inner.calls.append(1), "OBJECT.inner.calls"),
    "global with slots": (lambda s, x: add(COUNTER, "calls"), "COUNTER.calls"),
    "global count": (lambda s, x: next(NUMBERS), "NUMBERS"),
    "global name": (lambda s, x: keep_last(x), "LAST"),
    "closure": (lambda s, x: count(), "calls of counting"),
    "default": (lambda s, x: with_default(x), "a default of with_default"),
    "class's list": (lambda s, x: s.shared.append(1), "Base.shared"),
    "class's new": (lambda s, x: setattr(Base, "new", x.shape), "Base.new"),
    "another module's": (
        lambda s, x: elsewhere.KEPT.update(shape=x.shape),
        "constants_elsewhere.KEPT",
    ),
}


@pytest.fixture(autouse=True)
def as_before() -> Any:
    yield
    elsewhere.KEPT.pop("shape", None)
    if "new" in vars(Base):
        del Base.new


@pytest.mark.parametrize("case", NOTES)
def test_what_is_left_behind(case: str) -> None:
    note, said = NOTES[case]
    kind = type("Case", (Base,), {"note": note, "__module__": __name__})
    module = kind()
    with pytest.warns(UserWarning, match="its forward changes") as told:
        fuse(module)
    (text,) = [str(w.message) for w in told]
    assert f"its forward changes {said}" in text
    assert type(module) is kind


def test_the_first_run_tells() -> None:
    SEEN.clear()
    module = type("Case", (Base,), {"note": NOTES["global list"][0], "__module__": __name__})()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuse(module)
    assert len(SEEN) == 1


def test_what_only_reads_is_fused() -> None:
    def note(self: Any, x: Tensor) -> None:
        assert len(SEEN) >= 0
        assert all((self.queue, BY_NAME, OBJECT.inner, COUNTER, elsewhere.KEPT))
        [1].append(2)

    module = type("Case", (Base,), {"note": note, "__module__": __name__})()
    assert [e.reason for e in fuse_report(fuse(module))] == [None]
