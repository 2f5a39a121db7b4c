# SPDX-License-Identifier: BSD-3-Clause
"""Runs the steps of ``scripts/steps.py`` in their order, and ends with a table.

    python scripts/prove.py             every proof that has not passed on these sources yet
    python scripts/prove.py --test ...  the tests alone; the rest of the line is for pytest

A failing step does not keep the next from running. An interrupted run goes on with the next test:
what has passed is kept in build/prove for as long as no source changes. With ``--minutes`` as much
of each step runs as fits in its part of that time, and the next run goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import rich.table
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.steps import ROOT, Step, plan

FOLDER = ROOT / "build/prove"
COUNT = r"\d+ (?:passed|failed|skipped|deselected|errors?|warnings?)[,\s]*"
SUMMARY = re.compile(rf"^=*\s*((?:{COUNT})+)in ")
NOTHING_CHOSEN = 5  # pytest's exit status
OUT_OF_TIME = "no time was left"  # tests/selection.py says so
console = Console(highlight=False, width=100)


@dataclass
class Result:
    outcome: str
    """passed, failed, a part (which passed), nothing chosen, or why it did not run."""
    seconds: float = 0
    counts: str = ""
    log: str = ""


def digest_of_sources() -> str:
    """Of every file that git knows or would add, as it is now, but for pages of text."""
    listed = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")
    digest = hashlib.sha256()
    for name in sorted(name for name in names if name and not name.endswith(".md")):
        path = ROOT / name
        digest.update(f"{name}\0".encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


class Record:
    """What has passed on these sources, kept from run to run."""

    def __init__(self, fresh: bool) -> None:
        self.path, self.sources = FOLDER / "results.json", digest_of_sources()
        kept = json.loads(self.path.read_text()) if self.path.exists() and not fresh else {}
        same = kept.get("sources") == self.sources
        self.results = {k: Result(**v) for k, v in kept["steps"].items()} if same else {}
        if not same:
            for path in FOLDER.glob("*.passed"):
                path.unlink()

    def keep(self, name: str, result: Result) -> None:
        self.results[name] = result
        steps = {name: asdict(r) for name, r in self.results.items() if r.outcome == "passed"}
        self.path.write_text(json.dumps({"sources": self.sources, "steps": steps}, indent=1))


def file_of(step: Step, kind: str) -> Path:
    return FOLDER / (re.sub(r"\W+", "-", step.name) + f".{kind}")


def run(step: Step, options: list[str], seconds: float | None, passed: Path | None) -> Result:
    """Its output is shown, and kept in a file; of tests as many run as fit into ``seconds``.

    ``passed`` has the tests that need not be repeated.
    """
    command = [sys.executable, *step.command]
    if step.is_pytest:
        processes = min(4, len(os.sched_getaffinity(0)))
        command += ["-n", str(processes), "--dist", "worksteal", *options]
        command += [f"--until={time.time() + seconds:.0f}"] if seconds is not None else []
        command += [f"--passed={passed}"] if passed else []
    log = file_of(step, "log")
    began, counts, partly = time.monotonic(), "", False
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    # Each process rewrites the tests' assertions, unless one has left them where others find them.
    environment |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(ROOT / "build/pyc")}
    environment |= step.environment
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as process,
    ):  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            file.write(line)
            partly |= OUT_OF_TIME in line
            counts = match[1].strip(", ") if (match := SUMMARY.match(line)) else counts
    outcome = "passed" if process.returncode == 0 else "failed"
    if step.is_pytest and process.returncode == NOTHING_CHOSEN:
        if options:
            outcome = "nothing chosen"
        elif passed and passed.exists():
            outcome = "passed"  # before
    elif outcome == "passed" and partly:
        outcome = "a part"
    where = str(log.relative_to(ROOT)) if outcome == "failed" else ""
    return Result(outcome, time.monotonic() - began, counts, where)


def table(steps: list[Step], results: dict[str, Result]) -> rich.table.Table:
    shown = rich.table.Table(box=None, pad_edge=False)
    for title, justify in (("step", "left"), ("expected", "right"), ("took", "right"),
                           ("", "left"), ("", "left")):  # fmt: skip
        shown.add_column(title, justify=justify)
    for step in steps:
        r = results.get(step.name, Result(step.why_not or "not run"))
        took = f"{r.seconds / 60:.1f} min" if r.seconds else ""
        shown.add_row(step.name, f"{step.minutes:g} min", took, r.outcome, r.counts or r.log)
    return shown


def share_of(step: Step, left: list[Step], minutes: float) -> float | None:
    """Seconds for a step, of what is left for it and all after it; None where all of them fit."""
    expected = sum(other.minutes for other in left)
    return None if expected <= minutes else 60 * minutes * step.minutes / expected


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--test", action="store_true", help="the tests of `make test`")
    parser.add_argument("--only", help="steps by their names, separated by semicolons")
    parser.add_argument("--minutes", type=float, help="run a part of each step in this time")
    parser.add_argument("--fresh", action="store_true", help="repeat what has passed, too")
    parser.add_argument("--list", action="store_true", help="print the plan and stop")
    given, options = parser.parse_known_args(arguments)
    steps = [step for step in plan() if step.is_test or not given.test]
    if given.only:
        names = [name.strip() for name in given.only.split(";")]
        if unknown := set(names) - {step.name for step in steps}:
            parser.error(f"there is no step {', '.join(sorted(unknown))}; --list shows them")
        steps = [step for step in steps if step.name in names]
    FOLDER.mkdir(parents=True, exist_ok=True)
    record = Record(given.fresh)
    results = {} if given.test else dict(record.results)
    todo = [step for step in steps if step.name not in results and step.why_not is None]
    console.print(table(steps, results))
    console.print(f"{sum(step.minutes for step in todo):.0f} minutes expected on two cores")
    if given.list:
        return 0
    ends = time.monotonic() + 60 * (given.minutes or 0)
    status = 0
    try:
        for at, step in enumerate(todo):
            seconds = None
            if given.minutes:
                seconds = share_of(step, todo[at:], (ends - time.monotonic()) / 60)
            console.rule(step.name, align="left")
            passed = None if options or given.test else file_of(step, "passed")
            results[step.name] = run(step, options, seconds, passed)
            if results[step.name].outcome == "failed":
                status = 1
            if not options:
                record.keep(step.name, results[step.name])
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    tests = [results[step.name] for step in todo if step.is_pytest and step.name in results]
    if tests and all(result.outcome == "nothing chosen" for result in tests):
        status = NOTHING_CHOSEN
    console.rule()
    console.print(table(steps, results))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
