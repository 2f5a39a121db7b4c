# SPDX-License-Identifier: BSD-3-Clause
"""12,000 problems, drawn from what the docstrings promise and nothing else.

A problem is known by its kind and its number alone: ``run("head", 274)`` is the same everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import fuzz_modules
import fuzz_operators
import pytest
from fuzz_checks import check
from fuzz_draws import Draws

isa = pytest.mark.settings("isa")
COUNTS = {"dense": 4000, "filtered": 200, "adjoint": 600, "separable": 2400, "head": 2300}
COUNTS["module"] = 2500
PER_TEST = {"filtered": 20, "module": 50}
MAKERS: dict[str, Callable[[Draws], Any]] = {
    "dense": fuzz_operators.dense,
    "filtered": functools.partial(fuzz_operators.dense, filtered=True),
    "adjoint": fuzz_operators.adjoint,
    "separable": fuzz_operators.separable,
    "head": fuzz_operators.head,
    "module": fuzz_modules.twins,
}


def run(kind: str, number: int) -> None:
    d = Draws(f"{kind} {number}")
    problem = MAKERS[kind](d)
    try:
        (fuzz_modules.check if kind == "module" else check)(problem, d)
    except Exception as error:
        raise AssertionError(f"{kind} {number}, {problem}: {error}") from error


def each(*kinds: str) -> pytest.MarkDecorator:
    """So many problems of one kind to a test, as take a second or three."""
    parts = [
        pytest.param(kind, range(first, min(first + count, COUNTS[kind])), id=f"{kind}-{first}")
        for kind in kinds
        for count in [PER_TEST.get(kind, 100)]
        for first in range(0, COUNTS[kind], count)
    ]
    return pytest.mark.parametrize(("kind", "numbers"), parts)


first = pytest.mark.quick(when=lambda numbers: numbers.start == 0)


@first
@pytest.mark.settings("isa", "filtered")
@each("dense", "filtered", "adjoint")
def test_dense_pyramids(kind: str, numbers: range) -> None:
    for number in numbers:
        run(kind, number)


@first
@isa
@each("separable", "head")
def test_other_operators(kind: str, numbers: range) -> None:
    for number in numbers:
        run(kind, number)


@first
@isa
@each("module")
def test_modules_are_twins_of_plain_ones(kind: str, numbers: range) -> None:
    """After each of a few things that users do to them."""
    for number in numbers:
        run(kind, number)


def test_they_are_twelve_thousand() -> None:
    assert sum(COUNTS.values()) == 12_000
