# SPDX-License-Identifier: BSD-3-Clause
"""Results, each a line that is on the disk before the next case begins, so that a run can go on."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..evidence import store


class Journal:
    """The results of an environment by the name of their cases.

    Args:
        path: of the file; None keeps nothing.
        engine: a digest of what finds them out; those of another engine count as unknown.
    """

    def __init__(self, path: Path | None, engine: str) -> None:
        self.path, self.engine = path, engine
        self.results: dict[str, dict[str, Any]] = {}
        for line in self._lines():
            if line.get("engine") == engine:
                self.results[line["case"]] = line

    def _lines(self) -> Iterator[dict[str, Any]]:
        text = None if self.path is None else store.read_text(self.path)
        for line in (text or "").splitlines():
            with contextlib.suppress(ValueError, RecursionError):  # the last one may be cut off
                read = json.loads(line)
                if isinstance(read, dict) and isinstance(read.get("case"), str):
                    yield read

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
            if file.tell() > store.MOST_BYTES // 2:
                file.truncate(0)  # nobody's results take that much
            data = (json.dumps(line) + "\n").encode()
            file.write(data if self._ends_well(file.fileno()) else b"\n" + data)
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def _ends_well(number: int) -> bool:
        """Whether the last line is whole: who wrote it may have been killed."""
        size = os.fstat(number).st_size
        return size == 0 or os.pread(number, 1, size - 1) == b"\n"
