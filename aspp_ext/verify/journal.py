# SPDX-License-Identifier: BSD-3-Clause
"""Results, each a line that is on the disk when it is known, so that another run can go on."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from ..evidence import store
from ..evidence.entry import SAYS
from .isolation import CUT

FIELDS = {
    **dict.fromkeys(("case", "engine", "result", "why", "page", "says"), str),
    **dict.fromkeys(("error", "ratio", "seconds"), float),
    "final": bool,
}
"""Those that are read of a line."""


def parse(text: str) -> dict[str, Any]:
    """A line of a journal.

    Raises:
        ValueError: it is none; RecursionError: it is nested without end.
    """

    def refuse(constant: str) -> float:
        raise ValueError(f"expected JSON, got {constant}")

    read = json.loads(text, parse_constant=refuse)
    needed = {"case", "result"}
    if isinstance(read, dict) and read.get("result") == CUT:
        needed |= {"seconds"}
    if isinstance(read, dict) and read.get("result") == "timed":
        needed |= {"ratio", "says"}
    if not isinstance(read, dict) or not needed <= set(read):
        raise ValueError("expected a case and its result")
    for name, kind in FIELDS.items():
        if name in read and not isinstance(read[name], kind):
            raise ValueError(f"{name} must be {kind.__name__}, got {read[name]!r}")
    if read["result"] == "timed" and not (0 <= read["ratio"] < 1e12 and read["says"] in SAYS):
        raise ValueError(f"expected a ratio and what it says, got {read}")
    if not 0 <= read.get("error", 0.0) < 1e12:
        raise ValueError(f"error must be finite, got {read['error']}")
    return read


class Journal:
    """The results of an environment by the name of their cases.

    Args:
        path: of the file; None keeps nothing.
        engine: a digest of what finds them out; those of another engine count as unknown.
    """

    def __init__(self, path: Path | None, engine: str) -> None:
        self.path, self.engine = path, engine
        self.results: dict[str, dict[str, Any]] = {}
        text = None if path is None else store.read_text(path)
        for each in (text or "").splitlines():
            with contextlib.suppress(ValueError, RecursionError):  # the last one may be cut off
                line = parse(each)
                if line.get("engine") == engine:
                    self.results[line["case"]] = line

    def add(self, case: str, result: dict[str, Any]) -> None:
        """Keeps a result, in place of an earlier one.

        Raises:
            OSError: it cannot be written.
        """
        line = {"case": case, "engine": self.engine, **result}
        self.results[case] = line
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(self.path, flags, 0o644), "ab") as file:
            lines = [line]
            if file.tell() > store.MOST_BYTES // 2:  # most of it are earlier ones
                file.truncate(0)
                lines = [*self.results.values()]
            data = "".join(json.dumps(each) + "\n" for each in lines).encode()
            file.write(data if self._ends_well(file.fileno()) else b"\n" + data)
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def _ends_well(number: int) -> bool:
        """Whether the last line is whole: who wrote it may have been killed."""
        size = os.fstat(number).st_size
        return size == 0 or os.pread(number, 1, size - 1) == b"\n"
