# SPDX-License-Identifier: BSD-3-Clause
"""Where entries lie: a folder of the user's, and those that are committed beside the package.

Readers take no lock and never raise: what is not a plain file of a reasonable size with an entry in
it is not there. Writers replace whole files, one after the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from . import entry as entries
from .entry import Entry
from .environment import PACKAGE, Environment

VARIABLE = "ASPP_EXT_VERIFIED"
COMMITTED = PACKAGE / "verified"
MOST_BYTES = 1 << 20
MOST_FILES = 64
"""Entries that a store keeps; the oldest go."""
MOST_WAIT_S = 5.0
"""A writer that stopped in between, and replaces whole files, harms nobody."""


def is_off() -> bool:
    """Whether nothing that is unproven may run unasked, whatever was seen."""
    return os.environ.get(VARIABLE) == "off"


def folder() -> Path | None:
    """The user's store, which need not exist; None where it is switched off."""
    if is_off():
        return None
    if named := os.environ.get(VARIABLE):
        return Path(os.path.expanduser(named))
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(cache), "aspp_ext", "verified")


def read_text(path: Path) -> str | None:
    """What is in a plain file of at most MOST_BYTES; None for anything else."""
    # A pipe would wait for its writer, a link may lead to a device that never ends.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        number = os.open(path, flags)
    except (OSError, ValueError):
        return None
    try:
        with open(number, "rb") as file:
            status = os.fstat(number)
            if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
                return None
            data = file.read(MOST_BYTES + 1)
        return data.decode(errors="replace") if len(data) <= MOST_BYTES else None
    except OSError:
        return None


def read_entry(path: Path) -> Entry | None:
    text = read_text(path)
    try:
        return None if text is None else entries.parse(text)
    except (ValueError, ArithmeticError, RecursionError):
        return None


def find(environment: Environment) -> tuple[Path, Entry] | None:
    """The user's entry for an environment, and where it lies."""
    if (place := folder()) is None:
        return None
    path = place / f"{environment.name}.json"
    found = read_entry(path)
    # A file may have been given another's name.
    return None if found is None or found.environment != environment else (path, found)


def committed() -> Iterator[tuple[Path, Entry]]:
    with contextlib.suppress(OSError):
        for path in sorted(COMMITTED.glob("*.json")):
            if (found := read_entry(path)) is not None:
                yield path, found


def _wait_for(number: int) -> None:
    """Until the file is locked; or, as nobody writes for so long, until it is not worth it."""
    until = time.monotonic() + MOST_WAIT_S
    while time.monotonic() < until:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:  # some network file systems have no locks
            return
        else:
            return


@contextlib.contextmanager
def locked(place: Path) -> Iterator[None]:
    """Alone among the writers of a folder, which is made.

    Raises:
        OSError: the folder cannot be written.
    """
    place.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    number = os.open(place / ".lock", flags, 0o600)
    try:
        _wait_for(number)
        yield
    finally:
        os.close(number)


def replace(path: Path, text: str) -> None:
    """Writes a whole file: a reader sees the old one or the new one.

    Raises:
        OSError: it cannot be written.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(new, flags, 0o644), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(new)


def write(entry: Entry) -> Path | None:
    """Adds an entry to what the store has on its environment, in the place of what it has on the
    same cells and of what it has found wrong; None where it is off.

    Raises:
        OSError: the store cannot be written.
        ValueError: nobody could read it.
    """
    if (place := folder()) is None:
        return None
    path = place / f"{entry.environment.name}.json"
    with locked(place):
        verdicts = {}
        if (before := find(entry.environment)) is not None:
            kept = before[1].verdicts.items()
            verdicts = {cell: old for cell, old in kept if old.result not in entries.BAD}
        text = dataclasses.replace(entry, verdicts={**verdicts, **entry.verdicts}).text()
        entries.parse(text)
        replace(path, text)
        _forget_the_oldest(place)
    return path


def _forget_the_oldest(place: Path) -> None:
    """Of entries and journals by their names; what else lies there is not ours."""

    def age(path: Path) -> float:
        try:
            return path.lstat().st_mtime
        except OSError:
            return 0.0

    for pattern in (r".*-[0-9a-f]{16}\.json", r".*-[0-9a-f]{16}\.jsonl"):
        ours = [path for path in place.iterdir() if re.fullmatch(pattern, path.name)]
        for path in sorted(ours, key=age, reverse=True)[MOST_FILES:]:
            with contextlib.suppress(OSError):
                path.unlink()
