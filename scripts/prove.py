# SPDX-License-Identifier: BSD-3-Clause
"""Runs the steps of ``scripts/steps.py`` in their order, and ends with a table.

    python scripts/prove.py             every proof that has not passed on these sources yet
    python scripts/prove.py --test      the tests alone, all of them

Options that it does not know are pytest's. A failing step does not keep the next from running. The
run after an interrupted one goes on with the next test: what has passed without such options is
kept in build/prove for as long as no source changes. With ``--minutes`` as much
of each step runs as fits in its part of that time, and the next run goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

import rich.table
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import proof_record
from scripts.proof_record import Record, Result, add_new, count_passed, file_of
from scripts.steps import LATE, ROOT, Step, proof_steps, test_steps

NOTHING_CHOSEN = 5  # pytest's exit status
LEAST_SECONDS = 20
TESTED_WITH = ("ASPP_", "TRITON_", "TORCH", "PYTEST_", "PYTHONOPT", "OMP_", "MKL_", "ATEN_")
"""How the environment variables begin that would decide what is tested, or how."""
console = Console(highlight=False, width=100)


def environment_of(step: Step) -> dict[str, str]:
    """Of a suite nothing but the step decides what is tested, of a build where it goes."""
    dropped = TESTED_WITH if step.is_suite else ("ASPP_EXT_LIBRARY_DIR",)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    if step.is_suite:
        # Threads that wait for each other sleep. Where there are more of them than processors, by
        # other suites or other programs, they would keep from working whom they wait for.
        kept["OMP_WAIT_POLICY"] = "PASSIVE"
    # Each process rewrites the tests' assertions, unless one has left them where others find them.
    cache = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(ROOT / "build/pyc")}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **cache,
        **step.environment}  # fmt: skip


def end(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def follow(process: subprocess.Popen[str], log: TextIO) -> bool:
    """Shows its output and keeps it; returns whether it was interrupted.

    The first interrupt is handed on to its process group, and what that still says is followed to
    its end. Another one kills it, unless it is the same: make hands on what its group has, too.
    """
    assert process.stdout is not None
    interrupted = 0.0
    while True:
        try:
            for line in process.stdout:
                sys.stdout.write(line)
                sys.stdout.flush()
                log.write(line)
            return interrupted > 0
        except KeyboardInterrupt:
            if not interrupted:
                interrupted = time.monotonic()
                end(process, signal.SIGINT)
            elif time.monotonic() > interrupted + 1:
                end(process, signal.SIGKILL)
                return True


def counts_in(path: Path) -> dict[str, int]:
    """What a suite says at its end; empty where it did not come to it."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def run(step: Step, options: list[str], seconds: float | None, resume: bool) -> Result:
    """Its output is shown, and kept in a file; of tests as many run as fit into ``seconds``.

    Where it resumes, what has passed before is not repeated.
    """
    command = [sys.executable, *step.command]
    said, before = file_of(step, "counts"), 0
    said.unlink(missing_ok=True)
    if step.is_suite:
        processes = min(4, len(os.sched_getaffinity(0)))
        command += ["-n", str(processes), "--dist", "worksteal", f"--counts={said}", *options]
        command += [f"--seconds={seconds:.1f}"] if seconds is not None else []
        if resume:
            before = count_passed(step)
            command += [f"--passed={file_of(step, 'passed')}"]
    log, began = file_of(step, "log"), time.monotonic()
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, cwd=ROOT, env=environment_of(step), text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            interrupted = follow(process, file)
        except BaseException:
            end(process, signal.SIGKILL)
            raise
    add_new(file_of(step, "new"))
    counts = counts_in(said)
    late = counts.get(LATE, 0)
    shown = counts | ({"before": before} if before else {})
    text = ", ".join(f"{count} {outcome}" for outcome, count in shown.items())
    result = Result("failed", time.monotonic() - began, text)
    if interrupted:
        result.outcome = "interrupted"
    elif step.is_suite and process.returncode == NOTHING_CHOSEN and (options or before):
        result.outcome = "nothing chosen" if options else "passed"  # all of them, before
    elif process.returncode == 0 and (not step.is_suite or before or counts.get("passed")):
        result.outcome = "a part" if late else "passed"  # all skipped prove nothing
    result.log = str(log.relative_to(ROOT)) if result.outcome == "failed" else ""
    return result


def table(steps: list[Step], results: dict[str, Result], resume: bool) -> rich.table.Table:
    shown = rich.table.Table(box=None, pad_edge=False)
    for title, justify in (("step", "left"), ("expected", "right"), ("took", "right"),
                           ("", "left"), ("", "left")):  # fmt: skip
        shown.add_column(title, justify=justify)
    for step in steps:
        so_far = count_passed(step) if resume else 0
        not_run = Result(step.why_not or "not run", counts=f"{so_far} before" if so_far else "")
        r = results.get(step.name, not_run)
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
    named = {step.name for step in chosen}.union(*(step.needs for step in chosen))
    return [step for step in steps if step.name in named]


def run_all(
    todo: list[Step], given: argparse.Namespace, options: list[str], record: Record
) -> dict[str, Result]:
    """Of the steps that have run, also where an interrupt kept the others from running."""
    results: dict[str, Result] = {}
    ends = time.monotonic() + 60 * (given.minutes or 0)
    try:
        for at, step in enumerate(todo):
            if failed := [n for n in step.needs if n in results and results[n].outcome != "passed"]:
                results[step.name] = Result(f"not run: {failed[0]} failed")
                continue
            seconds = None
            if given.minutes:
                seconds = seconds_for(step, todo[at:], (ends - time.monotonic()) / 60)
            console.rule(step.name, align="left")
            resume = not (options or given.test)
            results[step.name] = run(step, options, seconds, resume)
            if results[step.name].outcome == "failed" and not resume:
                record.forget(step)  # a test may have failed that had passed
            elif not options:
                record.keep(step, results[step.name])
            if results[step.name].outcome == "interrupted":
                break
    except KeyboardInterrupt:
        console.print("interrupted")
    return results


def status_of(todo: list[Step], results: dict[str, Result]) -> int:
    """As an exit status."""
    outcomes = {results[step.name].outcome for step in todo if step.name in results}
    if len(results) < len(todo) or "interrupted" in outcomes:
        return 128 + signal.SIGINT
    if outcomes - {"passed", "a part", "nothing chosen"}:
        return 1
    suites = {results[step.name].outcome for step in todo if step.is_suite}
    return NOTHING_CHOSEN if suites == {"nothing chosen"} else 0


def minutes(text: str) -> float:
    if not 0 < (given := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"minutes must be finite and above 0, got {text}")
    return given


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str], list[Step], list[Step]]:
    """The options, those for pytest, all steps and the chosen ones."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], allow_abbrev=False,
        epilog="Other options are pytest's, for every suite; what passes then is not kept.",
    )  # fmt: skip
    parser.add_argument("--test", action="store_true", help="the tests of `make test`")
    parser.add_argument("--only", help="steps by their names, separated by semicolons")
    parser.add_argument("--minutes", type=minutes, help="run a part of each step in this time")
    parser.add_argument("--fresh", action="store_true", help="repeat what has passed, too")
    parser.add_argument("--list", action="store_true", help="print the plan and stop")
    given, options = parser.parse_known_args(arguments)
    steps = test_steps() if given.test else [*test_steps(), *proof_steps()]
    if given.only is None:
        return given, options, steps, steps
    names = [name.strip() for name in given.only.split(";")]
    if unknown := set(names) - {step.name for step in steps}:
        parser.error(f"there is no step {', '.join(sorted(unknown))}; --list shows them")
    chosen = [step for step in steps if step.name in names]
    if all(step.why_not for step in chosen):
        parser.error("; ".join(f"{step.name}: {step.why_not}" for step in chosen))
    return given, options, steps, chosen


def main(arguments: list[str]) -> int:
    given, options, steps, chosen = parse(arguments)
    folder = proof_record.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            console.print(f"another run is going on in {ROOT}: its builds and records are the same")
            return 2
        record = Record()
        resume = not (given.test or options)
        if given.fresh and resume and not given.list:
            for step in chosen:
                record.forget(step)
        before = dict(record.results) if resume and not given.fresh else {}
        wanted = [step for step in chosen if step.name not in before and step.why_not is None]
        todo = with_builds([s for s in wanted if s.is_suite or given.only is not None], steps)
        console.print(table(with_builds(chosen, steps), before, resume))
        console.print(f"{sum(step.minutes for step in todo):.0f} minutes expected on two cores")
        if not proof_record.sources():
            console.print("git does not know this tree: what passes is not kept for the next run")
        if given.list:
            return 0
        results = run_all(todo, given, options, record)
        console.rule()
        console.print(table(with_builds(chosen, steps), before | results, resume))
    return status_of(todo, results)


def take_interrupts() -> None:
    """SIGTERM is one, too; and SIGINT also for what a shell has started in the background, which
    ignores it, as would all that is started here."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


if __name__ == "__main__":
    take_interrupts()
    sys.exit(main(sys.argv[1:]))
