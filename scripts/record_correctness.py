# SPDX-License-Identifier: BSD-3-Clause
"""Writes <device>-correctness.csv from the steps of scripts/gpu_check.sh.

One row for each implementation and each proof that it needs, "passed" or "failed"; what did not run
has failed. aspp_ext/verified.py says which proofs these are, and cites such a file for every
architecture on which an implementation runs unasked.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from aspp_ext.verified import PROOFS
from benchmarks import csv_file, machine
from benchmarks.gpu.device import device_named

COLUMNS = (
    *("implementation", "check", "result", "detail", "date"),
    *("torch", "cuda", "triton", "device", "architecture", "commit"),
)
Row = dict[str, str]


def rows_of(table: str, implementation: str) -> list[Row]:
    """A row for each of its proofs from the lines name, result, seconds, detail."""
    steps = {}
    for line in table.splitlines():
        name, result, _, detail = line.split("\t")
        steps[name] = (result, detail)
    rows = []
    for check in PROOFS[implementation]:
        result, detail = steps.get(check, ("not run", "it was not asked for"))
        passed = result == "passed"
        text = detail if passed or result == "failed" else f"{result}: {detail}"
        verdict = {"result": "passed" if passed else "failed", "detail": text}
        rows.append({"implementation": implementation, "check": check} | verdict)
    return rows


def summary(rows: list[Row]) -> str:
    """Whether an implementation is proven, in one line."""
    failed = [row["check"] for row in rows if row["result"] != "passed"]
    name = rows[0]["implementation"]
    return f"{name}: " + (f"no proof by {', '.join(failed)}" if failed else "every proof passed")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts.record_correctness", description=__doc__)
    parser.add_argument("table", type=Path, help="the steps, one a line, fields behind tabs")
    parser.add_argument("out", type=Path, help="folder")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args(arguments)
    table = options.table.read_text("utf-8")
    ran = {line.split("\t")[0] for line in table.splitlines()}
    if not any(ran.intersection(proofs) for proofs in PROOFS.values()):
        print("no proof was asked for, none is recorded")
        return 0
    facts = device_named(options.device).facts()
    path = options.out / f"{machine.hyphenated(facts['device'])}-correctness.csv"
    by_implementation = [rows_of(table, name) for name in PROOFS]
    rows = [facts | row for rows in by_implementation for row in rows]
    csv_file.write(path, COLUMNS, rows)
    print(f"wrote {path}")
    print("\n".join(map(summary, by_implementation)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
