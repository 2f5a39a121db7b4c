# SPDX-License-Identifier: BSD-3-Clause
"""``python -m aspp_ext verify`` with a fault planted in the CPU's dense pyramid: a program of its
own, as the command forks before anything is computed.

    python tests/planted_verify.py FAULT ARGUMENT...
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from aspp_ext import dispatch
from aspp_ext.evidence.entry import Cell
from aspp_ext.testing import timing
from aspp_ext.verify import cases, command, failure, isolation, rightness

calls = itertools.count()


def wrong(y: Tensor) -> Tensor:
    """One number of every result that has a fourth channel."""
    if y.numel() and y.size(1) > 3:
        y[-1, 3, -1, -1] += 1
    return y


def different(y: Tensor) -> Tensor:
    """Another number each time."""
    if y.numel():
        y.flatten()[next(calls) % y.numel()] += 1
    return y


def crashing(y: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGSEGV)
    return y


def refusing(y: Tensor) -> Tensor:
    raise RuntimeError("an illegal memory access was encountered")


def hanging(y: Tensor) -> Tensor:
    while True:
        time.sleep(1)


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (wrong, different, crashing, refusing, hanging)
}
CELL = Cell("cpu", "atrous_pyramid", "float32", "inference")


def plant(fault: Callable[[Tensor], Tensor]) -> torch.library.Library:
    by_torch = next(
        i.call for i in dispatch.IMPLEMENTATIONS[CELL.operator] if i.name == "reference"
    )

    def kernel(x, weights, rates, scale=None, shift=None, relu=False, *_):
        return fault(by_torch(x, weights, rates, scale, shift, relu).clone())

    library = torch.library.Library("aspp_ext", "IMPL")
    library.impl(CELL.operator, kernel, "CPU")
    return library


def slow_down() -> None:
    """What is chosen, not the operator, which stays as right as it is; by a clock of its own."""
    slowed = itertools.count(1)
    seen = [0]

    def later(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def slow(*arguments):
            seen[0] = next(slowed)
            return call(*arguments)

        return slow

    def stopwatch(call: Callable[[], object]) -> tuple[float, float]:
        before = seen[0]
        call()
        seconds = 1.0 if seen[0] > before else 0.5
        return seconds, seconds

    known = dispatch.IMPLEMENTATIONS[CELL.operator]
    dispatch.IMPLEMENTATIONS[CELL.operator] = tuple(
        replace(i, call=later(i.call)) if i.name == "cpu" else i for i in known
    )
    timing.BY_WALL_CLOCK = stopwatch


def main(arguments: Sequence[str]) -> int:
    name, *rest = arguments
    command.cases = lambda *_, **__: [cases.Case(CELL, what) for what in ("right", "small")]
    if name == "hanging":
        command.QUIET_S, rightness.COMPILING = 1, 1
        for module in (isolation, rightness, failure):  # others take what they take
            module.PYTORCH = 10**6
    library = plant(FAULTS[name]) if name in FAULTS else slow_down()
    try:
        return command.main(rest)
    finally:
        del library


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
