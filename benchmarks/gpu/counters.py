# SPDX-License-Identifier: BSD-3-Clause
"""Bytes through DRAM, counted by Nsight Compute around a process of its own."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.calls import NamedCall
from benchmarks.gpu.device import MARK

ROOT = Path(__file__).resolve().parents[2]
METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
FAILED = (OSError, ValueError, subprocess.SubprocessError)
"""What `count_traffic` raises where bytes cannot be counted."""


def parse_counters(text: str) -> list[dict[str, float]]:
    """Bytes by kernel of each marked call, from Nsight Compute's raw page: a line of names, one of
    units, the launches.

    Raises:
        ValueError: the text has no such table.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = [row for row in csv.DictReader(io.StringIO("\n".join(lines))) if row["ID"].isdigit()]
    if not rows or not all(metric in rows[0] for metric in METRICS):
        raise ValueError("no counters in Nsight Compute's output: " + " ".join(text.split())[-200:])
    calls: list[dict[str, float]] = []
    moved: dict[str, float] = {}
    for row in rows:
        name = row["Kernel Name"]
        if MARK in name:
            calls.append(moved)
            moved = {}
            continue
        counted = sum(float(row[metric].replace(",", "")) for metric in METRICS)
        moved[name] = moved.get(name, 0.0) + counted
    return calls


def count_traffic(named: Sequence[NamedCall], limit_s: float) -> dict[NamedCall, dict[str, float]]:
    """DRAM bytes of each call by kernel.

    Raises:
        OSError, ValueError, subprocess.SubprocessError: they could not be counted.
    """
    profiler = shutil.which("ncu")
    if profiler is None:
        raise OSError("Nsight Compute (ncu) is not on the path")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "counters.csv")
        command = [profiler, "--profile-from-start", "off", "--clock-control", "none"]
        command += ["--metrics", ",".join(METRICS), "--print-units", "base", "--page", "raw"]
        command += ["--csv", "--log-file", str(log)]
        names = ",".join(call.name for call in named)
        command += [sys.executable, "-m", "benchmarks.gpu.kernels", "--once", names]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s, check=False
        )
        told = log.read_text() if log.exists() else ""
    calls = parse_counters(told or done.stdout + done.stderr)
    if len(calls) != len(named):
        raise ValueError(f"{len(calls)} of {len(named)} calls were counted")
    return dict(zip(named, calls, strict=True))
