# SPDX-License-Identifier: BSD-3-Clause
"""Which tests run in a process: those for its kernels, in a tier, under a setting, within its time.

Whose kernels a process tests is decided before Python starts, by its environment: the CPU's,
CUDA's under emulation, or Triton's under its interpreter. Markers say what is for which.
"""

from __future__ import annotations

import inspect
import json
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aspp_ext import _native, _triton
from scripts.steps import LATE

ALL_KERNELS = ("cpu", "emulated", "interpreted")
KERNELS = "emulated" if _native.emulated else "interpreted" if _triton.interpreted else "cpu"
"""Whose kernels this process tests."""
SETTINGS = ("sanitized", "filtered", "unfiltered", "isa", "threads", "stored", "architectures")
OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed", LATE)
ENDS = pytest.StashKey[float]()
NO_PARAMETERS = SimpleNamespace(marks=[], params={})
NAMES = dict.fromkeys(("kernels", "prove", "quick"), ALL_KERNELS) | {"settings": SETTINGS}
"""What these markers may name."""

MARKERS = f"""
kernels(*names): what computes it, of {", ".join(ALL_KERNELS)}; without this marker the CPU's
prove(*kernels): left to `make prove`, on these kernels or on all
quick(*kernels, when=None): stays in `make test`; with when, a function of some of the parameters,
  only where it is true; of this marker and prove the closest to a test decides
settings(*names): `make prove` repeats it under these settings, of {", ".join(SETTINGS)}
gpu: needs a CUDA device
triton: of the tests for a GPU those of Triton's kernels; given to those with such a parameter
large: needs many gigabytes of memory
"""


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup("aspp_ext")
    group.addoption("--tier", choices=["test", "prove"], help="of `make test`, or the rest")
    group.addoption("--setting", choices=SETTINGS, help="what has to hold under it, too")
    group.addoption("--threads", type=int, default=1, help="of PyTorch in each test")
    group.addoption("--passed", type=Path, help="a file: leaves out its tests; see Passed")
    group.addoption("--counts", type=Path, help="writes a file: of each outcome how many")
    group.addoption("--seconds", type=float, help="from the first test on: a part, what fits in")


def names_in(item: pytest.Item, marker: str) -> set[str]:
    return {name for mark in item.iter_markers(marker) for name in mark.args}


def kernels_of(item: pytest.Item) -> set[str]:
    """What a test says goes before what its file says; each of its parameters may leave fewer."""
    parameters = [m for m in getattr(item, "callspec", NO_PARAMETERS).marks if m.name == "kernels"]
    by_node: dict[Any, list[pytest.Mark]] = {}
    for node, mark in item.iter_markers_with_node("kernels"):
        by_node.setdefault(node, []).append(mark)
    for mark in parameters:  # they are among the test's own
        by_node[next(iter(by_node))].remove(mark)
    closest = next(filter(None, by_node.values()), [pytest.mark.kernels("cpu").mark])
    return set.intersection(*(set(mark.args) for mark in (*closest, *parameters)))


def parameters_of(item: pytest.Item) -> dict[str, Any]:
    return getattr(item, "callspec", NO_PARAMETERS).params


def wrong_in(item: pytest.Item) -> Iterator[str]:
    """A wrong name, or kernels that no process has, would take a test out of every run."""
    for mark in item.iter_markers():
        known = NAMES.get(mark.name, mark.args)
        if mark.name == "settings" and not mark.args:
            yield f"settings takes {known}, got none"
        if unknown := [name for name in mark.args if name not in known]:
            yield f"{mark.name} takes {known}, got {unknown}"
        if mark.name == "quick" and (unknown := [name for name in mark.kwargs if name != "when"]):
            yield f"quick takes when=, got {unknown}"
        when, has = mark.kwargs.get("when") if mark.name == "quick" else None, parameters_of(item)
        if when and (unknown := [name for name in names_of(when) if name not in has]):
            yield f"quick's `when` takes parameters of the test, {list(has)}, got {unknown}"
    kernels = kernels_of(item)
    if not kernels:
        yield "its markers leave no kernels to run on"
    elif any(item.iter_markers("gpu")) and "cpu" not in kernels:
        yield "a GPU's tests run in the CPU's process alone"


def check(items: Iterable[pytest.Item]) -> None:
    """While a file is collected, where an error is shown whichever process meets it."""
    for item in items:
        for sentence in wrong_in(item):
            raise pytest.Collector.CollectError(f"{item.nodeid}: {sentence}")


def names_of(when: Callable[..., bool]) -> list[str]:
    return list(inspect.signature(when).parameters)


def is_true_of(when: Callable[..., bool], item: pytest.Item) -> bool:
    return when(**{name: parameters_of(item)[name] for name in names_of(when)})


def is_left_to_prove(item: pytest.Item) -> bool:
    for mark in item.iter_markers():
        if mark.name in ("prove", "quick") and KERNELS in (mark.args or ALL_KERNELS):
            when = mark.kwargs.get("when")
            return mark.name == "prove" or not (when is None or is_true_of(when, item))
    return False


def is_chosen(item: pytest.Item) -> bool:
    option = item.config.option
    if option.setting and option.setting not in names_in(item, "settings"):
        return False
    if KERNELS not in kernels_of(item):
        return False
    return option.tier is None or is_left_to_prove(item) == (option.tier == "prove")


def is_of_triton(item: pytest.Item) -> bool:
    """Whether it has ``gpu_cases.BY_TRITON`` or one of its runs for a parameter."""
    values = list(parameters_of(item).values())
    values += [value.by for value in values if hasattr(value, "by")]
    return any(getattr(value, "backend", None) == "triton" for value in values)


def choose(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Takes out what is not for this process, and spreads what may not come to an end."""
    for item in filter(is_of_triton, items):
        item.add_marker("triton")
    chosen = [item for item in items if is_chosen(item)]
    if not torch.cuda.is_available() and "gpu" not in config.option.markexpr:
        chosen = [item for item in chosen if not item.get_closest_marker("gpu")]
    if (file := config.option.passed) and file.exists():
        passed = set(file.read_text(errors="replace").splitlines())
        chosen = [item for item in chosen if item.nodeid not in passed]
    taken = set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in taken])
    if seconds := config.option.seconds:
        # Another part in another run, the same in all processes of one.
        chosen.sort(key=lambda item: zlib.crc32(f"{seconds} {item.nodeid}".encode()))
    items[:] = chosen


class Passed:
    """Writes down what has passed, so that an interrupted run can go on from there.

    In a second file, named .new: a worker that takes a crashed one's place must find the same tests
    left out as the others.
    """

    def __init__(self, path: Path) -> None:
        self.file, self.called = path.with_suffix(".new").open("a", buffering=1), set[str]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":  # a subtest's, too
            (self.called.add if report.passed else self.called.discard)(report.nodeid)
        elif report.when == "teardown" and report.passed and report.nodeid in self.called:
            self.file.write(f"{report.nodeid}\n")


def skip_when_out_of_time(item: pytest.Item) -> None:
    """The time begins with a process's first test: those of a run begin together with that."""
    if seconds := item.config.option.seconds:
        now = time.monotonic()
        if now > item.config.stash.setdefault(ENDS, now + seconds):
            pytest.skip(LATE)


def status_of_late(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """They are counted apart, and no letter is shown for each."""
    late = report.skipped and f"Skipped: {LATE}" in str(report.longrepr)
    return (LATE, "", "") if late else None


def write_counts(terminalreporter: Any) -> None:
    """For scripts/prove.py."""
    stats = terminalreporter.stats
    if path := terminalreporter.config.option.counts:
        counts = {outcome: len(stats[outcome]) for outcome in OUTCOMES if stats.get(outcome)}
        path.write_text(json.dumps(counts))
