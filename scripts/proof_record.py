# SPDX-License-Identifier: BSD-3-Clause
"""What scripts/prove.py keeps in build/prove: what has passed, and of which sources."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import uuid
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from scripts.steps import ROOT, Step

FOLDER = ROOT / "build/prove"
BUILT_WITH = ("CC", "CXX", "CPP", "CFLAGS", "LDFLAGS", "CPATH", "CPLUS_", "LIBRARY_PATH", "CUDA",
    "NVCC", "ASPP_EXT_CUDA", "TORCH_CUDA")  # fmt: skip
"""How the environment variables begin that decide what is built."""


@dataclass
class Result:
    outcome: str
    """passed, a part, failed, nothing chosen, interrupted, or why it did not run or is not kept."""
    seconds: float = 0
    counts: str = ""
    log: str = ""


def sources() -> list[str]:
    """Every file that git knows or would add; none where it does not know this tree."""
    commands = (
        ("git", "rev-parse", "--show-toplevel"),
        ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"),
    )
    try:
        top, listed = (
            os.fsdecode(subprocess.check_output(command, cwd=ROOT, stderr=subprocess.DEVNULL))
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    return sorted(filter(None, listed.split("\0"))) if Path(top.strip("\n")) == ROOT else []


def tools() -> list[str]:
    """What compiles and runs the sources: versions, flags, the processor's instructions."""
    found = [sys.version]
    found += sorted(f"{d.name} {d.version}" for d in importlib.metadata.distributions())
    found += sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith(BUILT_WITH))
    for compiler in (os.environ.get("CXX") or "g++", "nvcc"):
        try:
            command = [*shlex.split(compiler), "--version"]
            found.append(subprocess.run(command, capture_output=True, text=True).stdout)
        except OSError:
            found.append(f"no {compiler}")
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.exists() else []
    return found + [line for line in lines if line.startswith(("flags", "Features"))][:1]


def digest_of_sources() -> str:
    """Of every source as it is now, and of what compiles and runs it."""
    if not (names := sources()):
        return uuid.uuid4().hex  # every time is the first
    digest = sha256(repr(tools()).encode())
    for name in names:
        path = ROOT / name
        digest.update(os.fsencode(f"{name}\0") + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


def file_of(step: Step, kind: str) -> Path:
    return FOLDER / (re.sub(r"\W+", "-", step.name) + f".{kind}")


def add_new(new: Path) -> None:
    """The tests that have passed in a run, to those that had before: see ``Passed`` in
    tests/selection.py."""
    if new.exists():
        with new.with_suffix(".passed").open("ab") as file:
            file.write(new.read_bytes())
        new.unlink()


def count_passed(step: Step) -> int:
    path = file_of(step, "passed")
    return path.read_bytes().count(b"\n") if path.exists() else 0


class Record:
    """What has passed on these sources, kept from run to run: whole suites, and their tests."""

    def __init__(self) -> None:
        self.path, self.results = FOLDER / "results.json", dict[str, Result]()
        self.sources = digest_of_sources()
        try:
            kept = json.loads(self.path.read_text())
            if kept["sources"] == self.sources:
                self.results = {name: Result(**result) for name, result in kept["steps"].items()}
                for new in FOLDER.glob("*.new"):
                    add_new(new)
                return
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # there is none, or it is damaged
        for pattern in ("*.passed", "*.new"):
            for path in FOLDER.glob(pattern):
                path.unlink()
        self.write()

    def write(self) -> None:
        """All of it or nothing."""
        steps = {name: asdict(result) for name, result in self.results.items()}
        new = self.path.with_suffix(".tmp")
        new.write_text(json.dumps({"sources": self.sources, "steps": steps}, indent=1))
        new.replace(self.path)

    def forget(self, step: Step) -> None:
        self.results.pop(step.name, None)
        for kind in ("passed", "new"):
            file_of(step, kind).unlink(missing_ok=True)
        self.write()

    def keep(self, step: Step, result: Result) -> None:
        """A suite that has passed. What ran while a source changed proves nothing."""
        if sources() and digest_of_sources() != self.sources:
            self.forget(step)
            if result.outcome in ("passed", "a part"):
                result.outcome = "not kept: a source has changed since the run began"
        elif step.is_suite and result.outcome == "passed":
            self.results[step.name] = result
            self.write()
