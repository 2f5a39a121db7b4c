# SPDX-License-Identifier: BSD-3-Clause
"""Where the time of aspp_ext goes on a GPU: `python -m benchmarks.gpu.kernels --out FOLDER`.

Each call is profiled several times with a cold L2, kernel by kernel. Then Nsight Compute, where it
is installed and may read the counters, counts the bytes that each call moves through DRAM: the law
is that a forward moves at most 1.3 times the compulsory ones.

Exits with 1 when a call failed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from aspp_ext.testing import timing
from benchmarks import csv_file, machine
from benchmarks.contest import one_line
from benchmarks.gpu import counters
from benchmarks.gpu import problems as table
from benchmarks.gpu.calls import NamedCall, calls
from benchmarks.gpu.device import Host, Kernel, device_named

MOST_TRAFFIC = 1.3
COLUMNS = (
    *("date", "commit", "device", "architecture", "torch", "cuda", "triton"),
    *("implementation", "call", "kernel", "launches", "p25_us", "p50_us", "p75_us", "share"),
    *("grid", "block", "registers", "shared_bytes", "dram_mb", "compulsory_mb", "note"),
)
Call = Callable[[], object]


def breakdown(device: Host, call: Call, flush: Call, repeats: int) -> list[dict[str, Any]]:
    """Per kernel, in the order of their first launch: launches and microseconds of one call."""
    call()
    seen: dict[str, list[list[Kernel]]] = {}
    for _ in range(repeats):
        flush()
        device.synchronize()
        once: dict[str, list[Kernel]] = {}
        for kernel in device.kernels(call):
            once.setdefault(kernel.name, []).append(kernel)
        for name, launched in once.items():
            seen.setdefault(name, []).append(launched)
    sums = {name: [sum(k.microseconds for k in ks) for ks in runs] for name, runs in seen.items()}
    total = sum(statistics.median(times) for times in sums.values())
    rows = []
    for name, times in sums.items():
        first = seen[name][0][0]
        quartiles = {f"p{p}_us": timing.quantile(times, p / 100) for p in (25, 50, 75)}
        share = {"share": quartiles["p50_us"] / total if total else ""}
        shape = {"grid": first.grid, "block": first.block, "registers": first.registers}
        launched = {"kernel": name, "launches": len(seen[name][0])}
        rows.append(launched | quartiles | share | shape | {"shared_bytes": first.shared_bytes})
    return rows


def traffic_rows(
    named: Sequence[NamedCall], moved: Mapping[NamedCall, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """The DRAM bytes of each call by kernel, and what they are of the compulsory ones."""
    rows = []
    for call in named:
        common = call.columns | {"call": f"{call.what}, DRAM"}
        total = sum(moved[call].values())
        note = f"{total / call.compulsory_bytes:.2f} times the compulsory bytes"
        if call.what.startswith("forward"):
            verdict = "met" if total <= MOST_TRAFFIC * call.compulsory_bytes else "above"
            note += f", at most {MOST_TRAFFIC}: {verdict}"
        counted = moved[call].items()
        rows += [common | {"kernel": name, "dram_mb": count / 1e6} for name, count in counted]
        rows.append(common | {"kernel": "all", "dram_mb": total / 1e6, "note": note})
    return rows


def run_once(device: Host, named: Iterable[NamedCall]) -> None:
    """Every call between the marks that a profiler outside this process looks for."""
    with torch.no_grad():
        for call in named:
            run = call.build()
            run()
            device.start_counting()
            run()
            device.mark()
            device.stop_counting()


def show(row: dict[str, Any]) -> str:
    name = f"{row['implementation']} {row['call']}"
    if "p50_us" in row:
        text = f"{row['p50_us']:9.1f} us {100 * (row['share'] or 0):3.0f} %  x{row['launches']}"
        return f"{name:32} {text}  {row['kernel'][:90]}"
    moved = f"{row['dram_mb']:.4g} of" if "dram_mb" in row else ""
    text = f"{moved} {row['compulsory_mb']:.4g} MB  {row.get('kernel', '')[:60]}"
    return f"{name:32} {text}  {row.get('note', '')}"


def profiled(
    device: Host, named: Sequence[NamedCall], repeats: int
) -> tuple[list[NamedCall], list[dict[str, Any]]]:
    """The calls that ran, and the rows of all."""
    flush, ran, rows = device.flusher(), [], []
    for call in named:
        try:
            with torch.no_grad():
                found = breakdown(device, call.build(), flush, repeats)
        except Exception as error:  # named in the table; the other calls still run
            found = [{"note": f"failed: {one_line(error)}"}]
        else:
            ran.append(call)
        rows += [call.columns | row for row in found]
        device.release()
    return ran, rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.kernels", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for counting bytes")
    parser.add_argument("--repeats", type=int, default=7, help="profiled calls")
    parser.add_argument("--once", metavar="NAMES", help="these calls, marked, and nothing else")
    options = parser.parse_args(arguments)
    device = device_named(options.device)
    problems = [table.on_gpu("operator", "large"), table.separable("operator", "large")]
    if options.device == "cpu":
        problems = [table.for_a_dry_run(problem) for problem in problems]
    named, absent = calls(device, problems)
    if options.once:
        wanted = options.once.split(",")
        run_once(device, [call for call in named if call.name in wanted])
        return 0

    facts = device.facts()
    path = options.out / f"{machine.hyphenated(facts['device'])}-kernels.csv"
    ran, rows = profiled(device, named, options.repeats)
    rows += absent
    csv_file.write(path, COLUMNS, [facts | row for row in rows])
    try:
        rows += traffic_rows(ran, counters.count_traffic(ran, options.limit))
    except counters.FAILED as error:
        note = f"not counted: {' '.join(str(error).split())[:200]}"
        rows += [call.columns | {"call": f"{call.what}, DRAM", "note": note} for call in ran]
    csv_file.write(path, COLUMNS, [facts | row for row in rows])
    print(f"wrote {path}")
    print("\n".join(map(show, rows)))
    return 0 if len(ran) == len(named) else 1


if __name__ == "__main__":
    sys.exit(main())
