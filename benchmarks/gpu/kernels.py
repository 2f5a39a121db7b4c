# SPDX-License-Identifier: BSD-3-Clause
"""Where the time of aspp_ext goes on a GPU: `python -m benchmarks.gpu.kernels --out FOLDER`.

Each call is profiled several times with a cold L2, kernel by kernel. Then Nsight Compute, where it
is installed and may read the counters, counts the bytes one forward moves through DRAM: the law is
at most 1.3 times the compulsory ones.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import csv_file, machine, timing
from benchmarks.gpu import problems as table
from benchmarks.gpu.device import Host, Kernel, device_named
from benchmarks.gpu.peers import Ours
from benchmarks.problems import Problem
from benchmarks.roofline import work_of

ROOT = Path(__file__).resolve().parents[2]
METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
MOST_TRAFFIC = 1.3
COLUMNS = (
    *("date", "commit", "device", "architecture", "torch", "cuda", "triton"),
    *("call", "kernel", "launches", "p25_us", "p50_us", "p75_us", "share"),
    *("grid", "block", "registers", "shared_bytes", "dram_mb", "compulsory_mb", "note"),
)
Call = Callable[[], object]


def calls(device: Host, problem: Problem) -> dict[str, Call]:
    """The operator and its gradients, one by one, as a training step runs them."""
    from aspp_ext.ops import pyramid  # noqa: F401  registers the operators

    ours = {layout: Ours(layout, device.backend) for layout in ("NHWC", "NCHW")}
    module, x = problem.build()
    found: dict[str, Call] = {
        f"forward {layout}": contender.build(module, x) for layout, contender in ours.items()
    }
    operators, last = torch.ops.aspp_ext, torch.channels_last
    weights = [conv.weight.detach().to(memory_format=last) for conv in module.dense]
    rates = [rate for rate in module.rates for _ in range(2)]
    kernels = [size for weight in weights for size in weight.shape[2:]]
    outputs = [weight.shape[0] for weight in weights]
    x = x.to(memory_format=last)
    grad = torch.randn_like(operators.atrous_pyramid(x, weights, rates))
    found["grad_input NHWC"] = lambda: operators.atrous_pyramid_grad_input(grad, weights, rates)
    found["grad_weight NHWC"] = lambda: operators.atrous_pyramid_grad_weight(
        grad, x, kernels, outputs, rates
    )
    return found


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


def parse_counters(text: str) -> dict[str, float]:
    """Bytes by kernel from Nsight Compute's raw page: a line of names, one of units, the launches.

    Raises:
        ValueError: the text has no such table.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = [row for row in csv.DictReader(io.StringIO("\n".join(lines))) if row["ID"].isdigit()]
    if not rows or not all(metric in rows[0] for metric in METRICS):
        raise ValueError("no counters in Nsight Compute's output: " + " ".join(text.split())[-200:])
    moved: dict[str, float] = {}
    for row in rows:
        counted = sum(float(row[metric].replace(",", "")) for metric in METRICS)
        moved[row["Kernel Name"]] = moved.get(row["Kernel Name"], 0.0) + counted
    return moved


def count_traffic(limit_s: float) -> dict[str, float]:
    """DRAM bytes of one forward by kernel, counted by Nsight Compute around a process of its own.

    Raises:
        OSError, ValueError, subprocess.SubprocessError: it could not be counted.
    """
    profiler = shutil.which("ncu")
    if profiler is None:
        raise OSError("Nsight Compute (ncu) is not on the path")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "counters.csv")
        command = [profiler, "--profile-from-start", "off", "--clock-control", "none"]
        command += ["--metrics", ",".join(METRICS), "--print-units", "base", "--page", "raw"]
        command += ["--csv", "--log-file", str(log)]
        command += [sys.executable, "-m", "benchmarks.gpu.kernels", "--once"]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s, check=False
        )
        told = log.read_text() if log.exists() else ""
        return parse_counters(told or done.stdout + done.stderr)


def run_once(device: Host, problem: Problem) -> None:
    """One forward between the marks that a profiler outside this process looks for."""
    with torch.no_grad():
        call = calls(device, problem)["forward NHWC"]
        call()
        device.start_counting()
        call()
        device.stop_counting()


def traffic_rows(problem: Problem, limit_s: float) -> list[dict[str, Any]]:
    compulsory = work_of(problem).bytes
    common = {"call": "forward NHWC, DRAM", "compulsory_mb": compulsory / 1e6}
    try:
        moved = count_traffic(limit_s)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return [common | {"note": f"not counted: {' '.join(str(error).split())[:200]}"}]
    total = sum(moved.values())
    verdict = "met" if total <= MOST_TRAFFIC * compulsory else "above"
    note = f"{total / compulsory:.2f} times the compulsory bytes, at most {MOST_TRAFFIC}: {verdict}"
    rows = [common | {"kernel": name, "dram_mb": count / 1e6} for name, count in moved.items()]
    return [*rows, common | {"kernel": "all", "dram_mb": total / 1e6, "note": note}]


def show(row: dict[str, Any]) -> str:
    if "p50_us" in row:
        text = f"{row['p50_us']:9.1f} us {100 * (row['share'] or 0):3.0f} %  x{row['launches']}"
        return f"{row['call']:17} {text}  {row['kernel'][:90]}"
    moved = f"{row['dram_mb']:.4g} of" if "dram_mb" in row else ""
    text = f"{moved} {row['compulsory_mb']:.4g} MB  {row.get('kernel', '')[:60]}"
    return f"{row['call']:17} {text}  {row.get('note', '')}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.kernels", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for counting bytes")
    parser.add_argument("--repeats", type=int, default=7, help="profiled calls")
    parser.add_argument("--once", action="store_true", help="one marked forward and nothing else")
    options = parser.parse_args(arguments)
    device = device_named(options.device)
    problem = table.on_gpu("operator", "large")
    if options.device == "cpu":
        problem = table.for_a_dry_run(problem)
    if options.once:
        run_once(device, problem)
        return 0

    facts, rows = device.facts(), []
    path = options.out / f"{machine.hyphenated(facts['device'])}-kernels.csv"
    flush = device.flusher()
    with torch.no_grad():
        for name, call in calls(device, problem).items():
            shape = {"call": name, "compulsory_mb": work_of(problem).bytes / 1e6}
            rows += [shape | row for row in breakdown(device, call, flush, options.repeats)]
            csv_file.write(path, COLUMNS, [facts | row for row in rows])
    device.release()
    rows += traffic_rows(problem, options.limit)
    csv_file.write(path, COLUMNS, [facts | row for row in rows])
    print(f"wrote {path}")
    print("\n".join(map(show, rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
