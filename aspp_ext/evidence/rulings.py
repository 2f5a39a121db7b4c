# SPDX-License-Identifier: BSD-3-Clause
"""What follows from the evidence for a call: whether an implementation runs unasked, and why.

CUDA's and Triton's kernels run where they were seen right and faster than PyTorch. The CPU's, which
every build's tests prove, run except where they were seen wrong or slower. A process reads what
there is once for each device and never measures anything.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import store
from .entry import BAD, SIZES, Cell, Entry, Speed, Verdict
from .environment import Environment, environment_of, kernel_digests

COMMAND = "python -m aspp_ext verify"
CLASSES = dict(zip(SIZES, (2**30, 2**32, None), strict=True))
"""Problems by their size, the pixels of the batch x input x output channels: up to where."""

TITLES = {"cuda": "CUDA", "triton": "Triton", "cpu": "CPU"}


class Source(NamedTuple):
    """Where a verdict or a time comes from."""

    path: Path
    date: str

    def __str__(self) -> str:
        return f"{self.date}, {self.path}"


class Known(NamedTuple):
    """What is known of a cell on a device."""

    verdict: Verdict
    source: Source
    speeds: dict[str, tuple[Speed, Source]]


def _applies(entry: Entry, here: Environment, implementation: str) -> bool:
    """Whether a committed entry is about these kernels on this architecture."""
    there, ours = entry.environment, here.kernels.get(implementation)
    same = there.architecture == here.architecture and ours is not None
    same = same and there.kernels.get(implementation) == ours
    return same and (implementation != "triton" or there.triton == here.triton)


@functools.cache
def known(device: str) -> dict[Cell, Known]:
    """By cell, for a device like "cuda:0"; read at the first call."""
    return _read(device) if not store.is_off() else {}


def _read(device: str) -> dict[Cell, Known]:
    here = environment_of(torch.device(device))
    found: dict[Cell, Known] = {}
    entries = [*store.committed()]
    if (own := store.find(here)) is not None:
        entries.append(own)  # what was seen here goes before what was seen elsewhere
    for path, entry in entries:
        source, is_own = Source(path, entry.date), own is not None and entry is own[1]
        for cell, verdict in entry.verdicts.items():
            if not (is_own or _applies(entry, here, cell.implementation.split()[0])):
                continue
            known_so_far = found.get(cell)
            speeds = {} if known_so_far is None else dict(known_so_far.speeds)
            if is_own or entry.environment.device == here.device:
                speeds.update({name: (speed, source) for name, speed in verdict.speeds.items()})
            if known_so_far is not None and not is_own and known_so_far.verdict.result in BAD:
                continue  # of two that are committed, the one that found a fault
            found[cell] = Known(verdict, source, speeds)
    return found


def stands_against(
    implementation: str, result: str | None, speeds: Mapping[str, Speed], size: str
) -> str | None:
    """What keeps an implementation from running unasked: "unknown", one of ``entry.RESULTS``, or a
    class of problems, which was not timed or for which it was too slow.

    Args:
        result: None where nothing is known.
        speeds: by class, where it was timed.
        size: one of CLASSES, or "" for what holds whatever the size.
    """
    sizes = [size] if size else [*CLASSES]
    if implementation == "cpu":
        if result in BAD:
            return result
        slower = [s for s in sizes if s in speeds and speeds[s].says == "slower"]
        return slower[0] if len(slower) == len(sizes) else None
    if result != "right":
        return result or "unknown"
    return next((s for s in sizes if s not in speeds or speeds[s].says != "faster"), None)


def forget() -> None:
    """The next question reads the store anew."""
    for cached in (known, against, kernel_digests, _told):
        cached.cache_clear()


def once_about_the_command(device: str) -> str | None:
    """A sentence for who has a GPU of which nothing is known, the first time it is asked for."""
    told = _told(device)
    if told or store.is_off() or known(device):
        return None
    told.append(True)
    return (
        f"nothing says yet that aspp_ext's kernels are right and fast on {device}, so PyTorch "
        f"computes there; `{COMMAND} --device {device}` finds out"
    )


@functools.cache
def _told(device: str) -> list[bool]:
    return []


def fingerprint(device: str) -> str:
    """A digest of all that is ruled on a device: processes with the same choose alike."""
    rows = sorted(
        (cell, found.verdict.result, sorted((n, s.says) for n, (s, _) in found.speeds.items()))
        for cell, found in known(device).items()
    )
    return hashlib.sha256(repr((store.is_off(), rows)).encode()).hexdigest()[:16]


def _what(cell: Cell) -> str:
    return f"{cell.operator} in {cell.precision} {cell.mode}"


def _named(implementation: str) -> str:
    return (
        f"backend='{implementation}' or ASPP_EXT_BACKEND={implementation} runs the "
        f"{TITLES[implementation]} kernels anyway"
    )


@functools.lru_cache(maxsize=1024)
def against(device: str, cell: Cell, size: str) -> str | None:
    """The reason not to run a cell's implementation unasked, or None.

    Args:
        device: like "cuda:0" or "cpu".
        size: one of CLASSES, or "" where sizes are symbolic: what holds for every size.
    """
    name, found = cell.implementation, known(device).get(cell)
    if name != "cpu" and store.is_off():
        return f"{store.VARIABLE}=off leaves out what was not proven everywhere; {_named(name)}"
    if name != "cpu" and (cell.operator, cell.mode) == ("aspp_inference", "training"):
        return f"the head is for inference, with gradients PyTorch computes it; {_named(name)}"
    speeds = {} if found is None else {each: speed for each, (speed, _) in found.speeds.items()}
    result = None if found is None else found.verdict.result
    reason = stands_against(name, result, speeds, size)
    if reason is None:
        return None
    if found is None:
        return (
            f"nothing says yet that the {TITLES[name]} kernels are right for {_what(cell)} on this "
            f"device; `{COMMAND}` finds out; {_named(name)}"
        )
    if reason == found.verdict.result:
        why = f": {found.verdict.why}" if found.verdict.why else ""
        return f"{reason} for {_what(cell)} ({found.source}){why}"
    if reason not in found.speeds:
        return (
            f"right, but not timed for {reason} problems of {_what(cell)} ({found.source}); "
            f"`{COMMAND}` does that; {_named(name)}"
        )
    speed, source = found.speeds[reason]
    return f"{_times(speed)} for {reason} problems of {_what(cell)} ({source})"


def _times(speed: Speed) -> str:
    return f"{speed.ratio:.2f}x as fast as the best of PyTorch"


def in_favour(device: str, cell: Cell, size: str) -> str:
    """What speaks for it, in a few words with the source; empty where nothing is known."""
    found = known(device).get(cell)
    if found is None or found.verdict.result != "right":
        return ""
    listed = [found.speeds[size]] if size in found.speeds else []
    words = [_times(speed) for speed, _ in listed]
    source = listed[0][1] if listed else found.source
    return ", ".join(["right", *words]) + f" ({source})"


def size_class(size: Any, is_known: Callable[[Any], bool] = bool) -> str:
    """Of CLASSES; "" where that is not known.

    Args:
        size: an int, or a symbolic one.
        is_known: whether a condition on the size is true, asked without a guard on it.
    """
    least = 0
    for name, most in CLASSES.items():
        if is_known(size >= least) and (most is None or is_known(size < most)):
            return name
        least = most or 0
    return ""
