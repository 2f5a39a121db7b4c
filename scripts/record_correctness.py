# SPDX-License-Identifier: BSD-3-Clause
"""Writes <device>-correctness.csv from the steps of scripts/gpu_check.sh.

One row a proof, "passed" or "failed"; what did not run has failed. aspp_ext/verified.py cites such
a file for every architecture on which the kernels run unasked.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import csv_file, machine
from benchmarks.gpu.device import device_named

COLUMNS = (
    *("check", "result", "detail", "date"),
    *("torch", "cuda", "triton", "device", "architecture", "commit"),
)


def rows_of(table: str, proofs: list[str]) -> list[dict[str, str]]:
    """A row for each proof from the lines name, result, seconds, detail."""
    steps = {}
    for line in table.splitlines():
        name, result, _, detail = line.split("\t")
        steps[name] = (result, detail)
    rows = []
    for check in proofs:
        result, detail = steps.get(check, ("not run", "it was not asked for"))
        passed = result == "passed"
        text = detail if passed or result == "failed" else f"{result}: {detail}"
        rows.append({"check": check, "result": "passed" if passed else "failed", "detail": text})
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts.record_correctness", description=__doc__)
    parser.add_argument("table", type=Path, help="the steps, one a line, fields behind tabs")
    parser.add_argument("out", type=Path, help="folder")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--proofs", nargs="+", required=True, help="every step that has to pass")
    options = parser.parse_args(arguments)
    facts = device_named(options.device).facts()
    path = options.out / f"{machine.hyphenated(facts['device'])}-correctness.csv"
    rows = rows_of(options.table.read_text("utf-8"), options.proofs)
    csv_file.write(path, COLUMNS, [facts | row for row in rows])
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
