# SPDX-License-Identifier: BSD-3-Clause
"""The command line: runs what is not known yet, keeps it, and shows all of it in a table."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import io
import itertools
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import _cuda, _native, _triton
from ..evidence import store
from ..evidence.entry import BAD, Cell, Entry, Speed, Verdict
from ..evidence.environment import PACKAGE, Environment, environment_of, hyphenated
from ..ops.separable_choice import use_separable_way
from . import isolation, report
from .cases import OPERATORS, RIGHT, Case, cases, timed
from .contest import contest
from .failure import Failure
from .isolation import BROKEN, CUT, FINAL, Beat
from .journal import Journal
from .rightness import Subject, judge

BUDGET_S, QUIET_S = 60.0, 20.0
MOST_AT_ONCE = 6
"""Children that compute on a GPU, of which Triton's compiler takes a processor each."""

TAKEN = ("out of memory", "can't allocate memory", "busy or unavailable")
"""In what is said where others have the memory, or the device, which one process may have."""
KEPT = ("ASPP_EXT_VERIFIED", "ASPP_EXT_LIBRARY_DIR")
"""Of our variables in the environment those that choose no kernel. What is found out is about calls
without the others."""
ENGINE = ("verify", "testing", "reference.py")
"""By whose sources results are known again, beside the environment."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    about = "Without a command: what was built, what was seen here, and which implementation runs."
    parser = argparse.ArgumentParser(prog="python -m aspp_ext", description=about)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fuse", help="shows what fuse makes of a model")  # is another module's
    command = commands.add_parser(
        "verify",
        help="finds out which kernels are right and fast on this machine",
        description="Finds out which kernels are right and fast on this machine, goes on where an "
        "earlier run ended, and keeps what it sees for aspp_ext to choose by. The exit status is 1 "
        "where something is wrong.",
    )
    command.add_argument("--device", help="cuda, cuda:N or cpu; by default a GPU if there is one")
    command.add_argument(
        "--quick", action="store_true", help="fewer precisions, and medium problems alone"
    )
    command.add_argument("--only", choices=OPERATORS, help="one operator", metavar="OPERATOR")
    command.add_argument(
        "--budget",
        type=_seconds,
        default=BUDGET_S,
        metavar="SECONDS",
        help="of work, by default 60",
    )
    command.add_argument(
        "--again", action="store_true", help="finds out anew what is known already"
    )
    command.add_argument(
        "--export", type=_file, metavar="FILE", help="writes what is known, to be shipped"
    )
    command.add_argument("--json", type=_file, metavar="FILE", help="writes the table as data")
    return parser.parse_args(arguments)


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < float("inf"):
            return seconds
    raise argparse.ArgumentTypeError(f"must be above 0 seconds, got {text}")


def _file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a folder that is there, got {text}")
    return path


def describe(device: str | None, beat: Beat) -> dict[str, Any]:
    """What the parent must not ask the device itself. Runs in a child."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    if kind not in ("cuda", "cpu") or not (number or "0").isdecimal():
        return {"error": f"--device must be cuda, cuda:N or cpu, got {device}"}
    if kind == "cuda" and not torch.cuda.is_available():
        return {"error": "--device cuda needs a GPU, and PyTorch sees none"}
    there = torch.device(f"cuda:{number or 0}" if kind == "cuda" else "cpu")
    try:
        x = torch.empty(1, 8, 9, 9, device=there)
    except (RuntimeError, AssertionError) as error:
        return {"error": f"--device {device}: {_first_line(error)}"}
    missing = {
        "cpu": _native.cpu_missing,
        "cuda": _cuda.why_not(x, 1),
        "triton": _triton.why_not(x, 1),
    }
    return {
        "device": str(there),
        "environment": dataclasses.asdict(environment_of(there)),
        "picked": "" if _native.cpu_missing else _native.picked_isa(),
        "missing": {name: reason for name, reason in missing.items() if reason},
    }


def solve(given: tuple[Case, str], beat: Beat) -> dict[str, Any]:
    """A case on a device. Runs in a child, which computes cases of one instruction set only."""
    case, device = given
    wanted = case.instruction_set
    if wanted and _native.use_isa(wanted) != wanted:
        why = f"this processor has no {wanted}"
        return {"result": "unavailable", "why": why, FINAL: True}
    subject = Subject(case.cell, device, beat)
    if device != "cpu":
        torch.cuda.set_device(device)
    try:
        if case.what == RIGHT:
            return {"result": "right", "error": round(judge(subject), 3)}
        return contest(subject, case.what)
    except Failure as failure:
        wrong = {"result": "wrong", "why": _line(str(failure)), "page": failure.page}
        return {**wrong, BROKEN: device != "cpu"}
    except Exception as error:
        # After an error nothing is sure on a GPU, nor after wrong results: a new process goes on.
        if isinstance(error, MemoryError) or any(words in str(error) for words in TAKEN):
            return {"result": "unavailable", "why": _first_line(error), BROKEN: True}
        why = f"{type(error).__name__}: {_first_line(error)}"
        page = traceback.format_exc()
        return {"result": "crashed", "why": why, "page": page, BROKEN: True}


def _first_line(error: BaseException) -> str:
    return _line(str(error).strip().partition("\n")[0])


def digest_of_engine() -> str:
    digest = hashlib.sha256()
    for name in ENGINE:
        place = PACKAGE / name
        for path in sorted(place.glob("*.py")) if place.is_dir() else [place]:
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is known is kept
    _choose_nothing()
    found = isolation.ask(describe, options.device, QUIET_S)
    if "result" in found:
        found = {"error": f"the device cannot be asked: {found['why']}\n{found['output']}"}
    if "error" in found:
        print(f"aspp_ext verify: {found['error']}", file=sys.stderr)
        return 2
    return Run(options, found).main()


def _choose_nothing() -> None:
    """Forgets our variables in this process, those that were read on import included."""
    for name in [n for n in os.environ if n.startswith("ASPP_EXT_") and n not in KEPT]:
        del os.environ[name]
    if _native.cpu_missing is None:
        _native.use_isa("")
    use_separable_way("")


class Run:
    """One call of the command."""

    def __init__(self, options: argparse.Namespace, found: dict[str, Any]) -> None:
        self.options, self.device = options, found["device"]
        self.environment = Environment(**found["environment"])
        self.missing = found["missing"]
        kind = torch.device(self.device).type
        self.kind, self.keeps = kind, timed(kind)
        self.every = cases(kind, found["picked"])
        self.cases = cases(kind, found["picked"], options.quick, options.only)
        self.folder = store.folder() if self.keeps else None
        path = None if self.folder is None else self.folder / f"{self.environment.name}.jsonl"
        self.journal = Journal(path, digest_of_engine())
        self.long = [case for case in self.cases if self.took_most_of_a_run(case)]
        self.fresh: set[str] = set()
        self.pages_at = self.folder
        self.complaints: list[str] = []

    def main(self) -> int:
        began = time.monotonic()
        try:
            self.solve(began + self.options.budget)
            stopped = False
        except KeyboardInterrupt:
            stopped = True
        table = self.verdicts(self.cases)
        entry = self.keep()
        facts = {"device": self.device, "environment": dataclasses.asdict(self.environment)}
        rows = report.rows(self.kind, table)
        data = json.dumps({**facts, "date": today(), "verdicts": rows}, indent=1)
        failed = False
        for path, text in ((self.options.json, data), (self.options.export, self.entry().text())):
            try:
                if path is not None:
                    path.write_text(text.rstrip() + "\n")
            except OSError as error:
                self.complaints.append(f"{path} cannot be written: {error}")
                failed = True
        with contextlib.suppress(BrokenPipeError):  # nobody reads on
            report.show(facts, rows, self.pages(), entry, self.complaints, time.monotonic() - began)
        if failed:
            return 2
        if stopped:
            return 130
        return 1 if any(row["result"] in BAD for row in rows) else 0

    def result_of(self, case: Case) -> str | None:
        known = self.journal.results.get(case.name)
        return None if known is None else known["result"]

    def took_most_of_a_run(self, case: Case) -> bool:
        known = self.journal.results.get(case.name, {})
        return known.get("result") == CUT and known["seconds"] > self.options.budget / 2

    def todo(self, group: Iterable[Case], cut: bool) -> Iterator[tuple[Case, str]]:
        """What of it is to be run, each asked for when what came before it is known.

        Args:
            cut: what took most of an earlier run and was cut off waits until the rest is known.
        """
        for case in group:
            if not cut and case in self.long:
                continue
            name = case.cell.implementation.split()[0]
            known = self.journal.results.get(case.name)
            if name in self.missing or (case.name in self.fresh):
                continue
            if known is not None and not self.options.again and is_final(known):
                continue
            if case.what != RIGHT and self.result_of(Case(case.cell, RIGHT)) != "right":
                continue
            yield case, self.device

    def solve(self, deadline: float) -> None:
        """Of each precision first what is right, several cases at a time, then what is fast."""
        progress = report.Progress(len(self.cases), deadline)
        at_once = {"cuda": max(1, min(MOST_AT_ONCE, (os.cpu_count() or 1) // 2)), "cpu": 1}
        by_kind = itertools.groupby(self.cases, lambda c: (c.cell.precision, c.what == RIGHT))
        groups = [(is_right, list(group)) for (_, is_right), group in by_kind]
        for is_right, group in [*groups, (False, self.long)]:
            for (case, _), result in isolation.run(
                progress.following(self.todo(group, group is self.long), lambda each: each[0].name),
                *(solve, QUIET_S, deadline),
                alike=lambda each: each[0].instruction_set,
                at_once=at_once[self.kind] if is_right else 1,
            ):
                self.fresh.add(case.name)
                if result["result"] == CUT:
                    seconds = result["seconds"]
                    why = f"not finished in the {seconds:.0f} s that were left of the budget"
                    self.complaints.append(f"{case.cell.title} ({case.what}): {why}")
                page = result.pop("page", None) or result.pop("output", None)
                if page and result["result"] in BAD:
                    result["page"] = self.write_page(case, f"{case.name}\n{page}")
                self.add(case, result)
        progress.end()

    def add(self, case: Case, result: dict[str, Any]) -> None:
        try:
            self.journal.add(case.name, result)
        except OSError as error:
            self.journal.path = None
            self.complaints.append(f"results cannot be kept: {error}")

    def write_page(self, case: Case, text: str) -> str:
        """Where it was written; empty where that cannot be done."""
        self.pages_at = self.pages_at or Path(tempfile.mkdtemp(prefix="aspp_ext-"))
        place = self.pages_at / "failures" / self.environment.name
        path = place / f"{hyphenated(case.name)}.txt"
        try:
            place.mkdir(parents=True, exist_ok=True)
            store.replace(path, text[: store.MOST_BYTES // 16])
        except OSError as error:
            self.complaints.append(f"a failure cannot be described: {error}")
            return ""
        return str(path)

    def verdicts(self, listed: Sequence[Case]) -> dict[Cell, Verdict | None]:
        """Of every cell; None where it was not reached."""
        found: dict[Cell, Verdict | None] = {}
        for case in listed:
            result = self.journal.results.get(case.name)
            reason = self.missing.get(case.cell.implementation.split()[0])
            if reason is not None:
                found[case.cell] = Verdict("unavailable", why=_line(reason))
            elif case.what == RIGHT:
                found[case.cell] = None
                if result is not None and result["result"] != CUT:
                    why = _line(result.get("why", ""))
                    found[case.cell] = Verdict(result["result"], result.get("error"), why)
            elif result is not None and (verdict := found[case.cell]) is not None:
                found[case.cell] = with_speed(verdict, case.what, result)
        return found

    def entry(self) -> Entry:
        """Of all that is known by now."""
        table = self.verdicts(self.every)
        known = {cell: verdict for cell, verdict in table.items() if verdict is not None}
        return Entry(self.environment, today(), known)

    def keep(self) -> Path | None:
        """Writes the entry for dispatch; returns where."""
        entry = self.entry()
        if not self.keeps or not entry.verdicts:
            return None
        try:
            return store.write(entry)
        except (OSError, ValueError) as error:
            self.complaints.append(f"the entry cannot be kept: {error}")
            return None

    def pages(self) -> list[tuple[str, str, str]]:
        """Of what is wrong: the case, why, and where more is written."""
        results = ((case.name, self.journal.results.get(case.name)) for case in self.cases)
        return [
            (name, result.get("why", ""), result.get("page", ""))
            for name, result in results
            if result is not None and result["result"] in BAD
        ]


def is_final(known: dict[str, Any]) -> bool:
    """Whether another run need not find it out anew."""
    return known["result"] in ("right", "wrong", "timed") or bool(known.get(FINAL))


def with_speed(verdict: Verdict, size: str, result: dict[str, Any]) -> Verdict:
    """The verdict with what a contest gave; one that crashed or hung goes before "right"."""
    if result["result"] == "timed":
        speed = Speed(result["ratio"], result["says"])
        return dataclasses.replace(verdict, speeds={**verdict.speeds, size: speed})
    if result["result"] in BAD:
        why = f"{size} problems: {result.get('why', '')}"
        return dataclasses.replace(verdict, result=result["result"], why=_line(why))
    return verdict


def _line(text: str) -> str:
    """As an entry may hold it."""
    return "".join(c if c.isprintable() else " " for c in text)[:500]


def today() -> str:
    return datetime.date.today().isoformat()
