# SPDX-License-Identifier: BSD-3-Clause
"""Measuring which tile is fastest, where the user asks for it.

``ASPP_EXT_TRITON_TUNE`` says whether, read on every call:

* unset: the pure functions of ``configurations.py`` decide; nothing is ever measured;
* ``1``: the first call of a problem measures its candidates and records the fastest;
* ``read``: records decide where there are some; nothing is measured.

Records are one JSON file, ``ASPP_EXT_TRITON_RECORDS`` or ``~/.cache/aspp_ext/triton.json``, and
name the device, Triton's version and the problem, so that one file serves many machines.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import torch
import triton
import triton.testing

from .configurations import Configuration
from .target import Target

MODES = ("", "1", "read")

_lock = threading.Lock()
_records: dict[str, list[int]] | None = None
_read_from: Path | None = None


def mode() -> str:
    """What ``ASPP_EXT_TRITON_TUNE`` says.

    Raises:
        ValueError: it is neither unset nor one of the two words.
    """
    value = os.environ.get("ASPP_EXT_TRITON_TUNE", "")
    if value not in MODES:
        raise ValueError(f"aspp_ext: ASPP_EXT_TRITON_TUNE must be 1 or read, got {value!r}")
    return value


def path() -> Path:
    """Where the records are."""
    named = os.environ.get("ASPP_EXT_TRITON_RECORDS")
    return Path(named) if named else Path.home() / ".cache" / "aspp_ext" / "triton.json"


def choose(
    target: Target,
    problem: Sequence[Hashable],
    candidates: Sequence[Configuration],
    launch: Callable[[Configuration], object],
) -> Configuration:
    """The configuration for a problem: the first candidate, or the one that has been measured.

    Args:
        problem: everything that the time depends on, besides the device.
        candidates: not empty; the one to take unmeasured comes first.
        launch: computes the problem with one of them; may be called many times.
    """
    wanted = mode()
    if not wanted or len(candidates) == 1:
        return candidates[0]
    key = _key(target, problem)
    with _lock:
        recorded = _load().get(key)
        if recorded is not None and (found := Configuration(*recorded)) in candidates:
            return candidates[candidates.index(found)]  # a number may have been written otherwise
        if wanted == "read" or target.is_capturing():
            return candidates[0]
        times = [_milliseconds(launch, candidate) for candidate in candidates]
        best = candidates[times.index(min(times))]
        _store(key, best)
        return best


def _key(target: Target, problem: Sequence[Hashable]) -> str:
    name = "interpreter"
    if not target.is_interpreter and target.device.type == "cuda":
        name = torch.cuda.get_device_name(target.device)
    return " | ".join([name, target.architecture, triton.__version__, *map(str, problem)])


def _milliseconds(launch: Callable[[Configuration], object], candidate: Configuration) -> float:
    launch(candidate)  # compiles
    return triton.testing.do_bench(lambda: launch(candidate), return_mode="median")


def _load() -> dict[str, list[int]]:
    """The records, read once from each path; a file that is not theirs counts as empty."""
    global _records, _read_from
    if _records is None or _read_from != path():
        _records, _read_from = {}, path()
        with contextlib.suppress(OSError, ValueError, RecursionError):
            # A pipe would wait for its writer.
            text = json.loads(_read_from.read_text("utf-8")) if _read_from.is_file() else {}
            fields = len(Configuration._fields)
            _records = {
                key: value
                for key, value in (text.items() if isinstance(text, dict) else ())
                if isinstance(value, list) and len(value) == fields
            }
    return _records


def _store(key: str, best: Configuration) -> None:
    """Adds a record and replaces the file, with what other processes have added meanwhile."""
    global _records
    kept = dict(_load())
    _records = None
    _records = {**kept, **_load(), key: list(best)}
    path().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path().parent, suffix=".json", delete=False, encoding="utf-8"
    ) as file:
        json.dump(_records, file, indent=1, sort_keys=True)
    os.replace(file.name, path())
