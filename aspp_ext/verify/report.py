# SPDX-License-Identifier: BSD-3-Clause
"""What the command shows: a line while it runs, and a table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..evidence.entry import Cell, Verdict
from ..evidence.rulings import CLASSES, stands_against

T = TypeVar("T")
NOT_REACHED = "not reached"
WIDTH = 30


class Progress:
    """A bar that is overwritten; silent where nobody looks."""

    def __init__(self, total: int, deadline: float) -> None:
        self.total, self.deadline, self.done = max(total, 1), deadline, 0
        self.began = time.monotonic()
        self.shows = sys.stderr.isatty()

    def following(self, items: Iterable[T], name: Callable[[T], str]) -> Iterator[T]:
        for item in items:
            self._show(name(item))
            yield item
            self.done += 1

    def _show(self, name: str) -> None:
        if not self.shows:
            return
        now = time.monotonic()
        spent = (now - self.began) / max(self.deadline - self.began, 1e-9)
        filled = min(WIDTH, int(WIDTH * max(spent, self.done / self.total)))
        bar = "#" * filled + "." * (WIDTH - filled)
        left = max(0.0, self.deadline - now)
        print(f"\r[{bar}] {left:3.0f} s  {name:<70.70}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.shows:
            print(f"\r{'':<{WIDTH + 82}}\r", end="", file=sys.stderr, flush=True)


def rows(device: str, table: dict[Cell, Verdict | None]) -> list[dict[str, Any]]:
    """The table as data: a cell each, with what follows from it for each class of problems."""
    found = []
    for cell, verdict in table.items():
        row: dict[str, Any] = {**cell._asdict(), "result": NOT_REACHED, "error": None, "why": ""}
        speeds = {} if verdict is None else verdict.speeds
        if verdict is not None:
            row |= {"result": verdict.result, "error": verdict.error, "why": verdict.why}
        result = None if verdict is None else verdict.result
        row["speeds"] = {name: speed._asdict() for name, speed in speeds.items()}
        row["runs"] = {}
        if " " not in cell.implementation:  # else this machine picks another instruction set
            name = cell.implementation
            row["runs"] = {
                size: stands_against(name, result, speeds, size) is None for size in CLASSES
            }
        found.append(row)
    return found


def decision(row: dict[str, Any]) -> str:
    used = [name for name, is_so in row["runs"].items() if is_so]
    if not row["runs"]:
        return "-"
    if len(used) == len(row["runs"]):
        return "used"
    return f"used where {' or '.join(used)}" if used else "PyTorch"


def _cells(row: dict[str, Any]) -> list[str]:
    error = row["error"]
    speeds = [row["speeds"].get(name) for name in CLASSES]
    return [
        *(row[name] for name in ("implementation", "operator", "precision", "mode", "result")),
        "" if not error else f"{error:.2f}",
        *("" if s is None else f"{s['ratio']:.2f} {s['says']}" for s in speeds),
        decision(row),
    ]


TITLES = [
    "implementation",
    "operator",
    "precision",
    "mode",
    "result",
    "error",
    *CLASSES,
    "decision",
]


def show(
    facts: dict[str, Any],
    listed: Sequence[dict[str, Any]],
    failures: Sequence[tuple[str, str, str]],
    entry: Path | None,
    complaints: Sequence[str],
    seconds: float,
) -> None:
    environment = facts["environment"]
    lines = [TITLES, *map(_cells, listed)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(f"{text:<{w}}" for text, w in zip(line, widths, strict=True)).rstrip())
    print(
        f"\nerror: as a multiple of PyTorch's; {', '.join(CLASSES)}: PyTorch's best time over ours"
    )
    for name, why, page in failures:
        print(f"{name}: {why}{f'; {page} has more' if page else ''}")
    for complaint in complaints:
        print(complaint)
    reached = sum(row["result"] != NOT_REACHED for row in listed)
    known = f"{reached} of {len(listed)} known, {seconds:.0f} s"
    known += "; run it again to go on" * (entry is not None and reached < len(listed))
    where = f"; kept in {entry}" if entry else "; nothing was kept"
    print(f"{environment['device']} ({environment['architecture']}), {known}{where}")
