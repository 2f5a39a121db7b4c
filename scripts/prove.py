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
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import rich.table
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.steps import OUT_OF_TIME, ROOT, Step, proof_steps, test_steps

FOLDER = ROOT / "build/prove"
SUMMARY = re.compile(r"^=*\s*((?:\d+ \w+[,\s]*)+)in \d")
NOTHING_CHOSEN = 5  # pytest's exit status
LEAST_SECONDS = 20
console = Console(highlight=False, width=100)


@dataclass
class Result:
    outcome: str
    """passed, a part, failed, nothing chosen, or why it did not run."""
    seconds: float = 0
    counts: str = ""
    log: str = ""


def digest_of_sources() -> str:
    """Of every file that git knows or would add, as it is now, and of what compiles and runs it."""
    listed = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    try:
        names = subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")
    except (OSError, subprocess.CalledProcessError):
        return uuid.uuid4().hex  # without git every time is the first
    tools = [sys.version, *(os.environ.get(name, "") for name in ("CXX", "CPPFLAGS", "CXXFLAGS"))]
    for package in ("torch", "triton", "numpy"):
        found = importlib.metadata.distributions(name=package)
        tools += [distribution.version for distribution in found]
    digest = sha256(repr(tools).encode())
    for name in sorted(filter(None, names)):
        path = ROOT / name
        digest.update(f"{name}\0".encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


def file_of(step: Step, kind: str) -> Path:
    return FOLDER / (re.sub(r"\W+", "-", step.name) + f".{kind}")


class Record:
    """What has passed on these sources, kept from run to run: whole suites, and their tests."""

    def __init__(self) -> None:
        self.path, self.results = FOLDER / "results.json", dict[str, Result]()
        kept = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.sources = digest_of_sources()
        if kept.get("sources") == self.sources:
            self.results = {name: Result(**result) for name, result in kept["steps"].items()}
        else:
            for path in FOLDER.glob("*.passed"):
                path.unlink()
            self.write()

    def write(self) -> None:
        steps = {name: asdict(result) for name, result in self.results.items()}
        self.path.write_text(json.dumps({"sources": self.sources, "steps": steps}, indent=1))

    def forget(self, step: Step) -> None:
        self.results.pop(step.name, None)
        file_of(step, "passed").unlink(missing_ok=True)
        self.write()

    def keep(self, step: Step, result: Result) -> None:
        """A suite that has passed, unless a source has changed while it ran."""
        if digest_of_sources() != self.sources:
            self.forget(step)
        elif step.is_suite and result.outcome == "passed":
            self.results[step.name] = result
            self.write()


def environment_of(step: Step) -> dict[str, str]:
    """Of a suite nothing but the step decides what is tested."""
    kept = dict(os.environ)
    if step.is_suite:
        kept = {k: v for k, v in kept.items() if not k.startswith(("ASPP_E", "TRITON_"))}
        # Threads that wait for each other sleep. Where there are more of them than processors, by
        # other suites or other programs, they would keep from working whom they wait for.
        kept["OMP_WAIT_POLICY"] = "PASSIVE"
    # Each process rewrites the tests' assertions, unless one has left them where others find them.
    cache = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(ROOT / "build/pyc")}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **cache,
        **step.environment}  # fmt: skip


def run(step: Step, options: list[str], seconds: float | None, passed: Path | None) -> Result:
    """Its output is shown, and kept in a file; of tests as many run as fit into ``seconds``.

    ``passed`` has the tests that need not be repeated.
    """
    command = [sys.executable, *step.command]
    if step.is_suite:
        processes = min(4, len(os.sched_getaffinity(0)))
        command += ["-n", str(processes), "--dist", "worksteal", *options]
        command += [f"--seconds={seconds:.1f}"] if seconds is not None else []
        command += [f"--passed={passed}"] if passed else []
    log, began = file_of(step, "log"), time.monotonic()
    counts, partly = "", False
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, cwd=ROOT, env=environment_of(step), text=True, errors="replace",
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
    result = Result("failed", time.monotonic() - began, counts)
    if process.returncode == 0:
        result.outcome = "a part" if partly else "passed"
        if step.is_suite and " passed" not in counts:
            result.outcome = "failed"  # tests that were all skipped prove nothing
    elif step.is_suite and process.returncode == NOTHING_CHOSEN:
        if options:
            result.outcome = "nothing chosen"
        elif passed and passed.exists():
            result.outcome = "passed"  # all of them, before
    result.log = str(log.relative_to(ROOT)) if result.outcome == "failed" else ""
    return result


def table(steps: list[Step], results: dict[str, Result]) -> rich.table.Table:
    shown = rich.table.Table(box=None, pad_edge=False)
    for title, justify in (("step", "left"), ("expected", "right"), ("took", "right"),
                           ("", "left"), ("", "left")):  # fmt: skip
        shown.add_column(title, justify=justify)
    for step in steps:
        r = results.get(step.name, Result(step.why_not or "not run"))
        took = f"{r.seconds / 60:.1f} min" if r.seconds else ""
        shown.add_row(step.name, f"{step.minutes:g} min", took, r.outcome, f"{r.counts} {r.log}")
    return shown


def seconds_for(step: Step, left: list[Step], minutes: float) -> float | None:
    """Of what is left for it and all after it; None where all of them fit."""
    expected = sum(other.minutes for other in left)
    if expected <= minutes:
        return None
    return max(LEAST_SECONDS, 60 * minutes * step.minutes / expected)


def with_builds(chosen: list[Step], steps: list[Step]) -> list[Step]:
    """The steps in order, each behind what it needs; a build that is not needed is left out."""
    named = {step.name for step in chosen} | {step.needs for step in chosen}
    return [step for step in steps if step.name in named]


def run_all(
    todo: list[Step], given: argparse.Namespace, options: list[str], record: Record
) -> dict[str, Result]:
    """Of the steps that have run, also where an interrupt kept the others from running."""
    results: dict[str, Result] = {}
    ends = time.monotonic() + 60 * (given.minutes or 0)
    try:
        for at, step in enumerate(todo):
            if step.needs in results and results[step.needs].outcome != "passed":
                results[step.name] = Result(f"not run: {step.needs} failed")
                continue
            seconds = None
            if given.minutes:
                seconds = seconds_for(step, todo[at:], (ends - time.monotonic()) / 60)
            console.rule(step.name, align="left")
            passed = None if options or given.test else file_of(step, "passed")
            results[step.name] = run(step, options, seconds, passed)
            if not options:
                record.keep(step, results[step.name])
    except KeyboardInterrupt:
        console.print("interrupted")
    return results


def status_of(todo: list[Step], results: dict[str, Result]) -> int:
    """As an exit status."""
    outcomes = {results[step.name].outcome for step in todo if step.name in results}
    if len(results) < len(todo):
        return 128 + signal.SIGINT
    if outcomes - {"passed", "a part", "nothing chosen"}:
        return 1
    suites = {results[step.name].outcome for step in todo if step.is_suite}
    return NOTHING_CHOSEN if suites == {"nothing chosen"} else 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--test", action="store_true", help="the tests of `make test`")
    parser.add_argument("--only", help="steps by their names, separated by semicolons")
    parser.add_argument("--minutes", type=float, help="run a part of each step in this time")
    parser.add_argument("--fresh", action="store_true", help="repeat what has passed, too")
    parser.add_argument("--list", action="store_true", help="print the plan and stop")
    given, options = parser.parse_known_args(arguments)
    steps = test_steps() if given.test else [*test_steps(), *proof_steps()]
    chosen = steps
    if given.only:
        names = [name.strip() for name in given.only.split(";")]
        if unknown := set(names) - {step.name for step in steps}:
            parser.error(f"there is no step {', '.join(sorted(unknown))}; --list shows them")
        chosen = [step for step in steps if step.name in names]
    FOLDER.mkdir(parents=True, exist_ok=True)
    record = Record()
    if given.fresh:
        for step in chosen:
            record.forget(step)
    before = {} if given.test else dict(record.results)
    wanted = [step for step in chosen if step.name not in before and step.why_not is None]
    todo = with_builds([step for step in wanted if step.is_suite or given.only], steps)
    console.print(table(with_builds(chosen, steps), before))
    console.print(f"{sum(step.minutes for step in todo):.0f} minutes expected on two cores")
    if given.list:
        return 0
    results = run_all(todo, given, options, record)
    console.rule()
    console.print(table(with_builds(chosen, steps), before | results))
    return status_of(todo, results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
