# SPDX-License-Identifier: BSD-3-Clause
"""Peak extra memory of one inference call, seen from outside the allocators.

PyTorch counts what its own allocator hands out, not what a native library takes, so this reads the
kernel's high-water mark of resident memory (/proc/self/status) around one call, in a process of
its own in which malloc returns freed blocks at once. The process warms up on a smaller map first:
libraries are loaded and weights packed, but no buffer of the map's size can be left over. What a
module of ours keeps for the map's size, the weights prepared for minimal filtering, is made before
the call and counted by itself.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import peers
from benchmarks.problems import PROBLEMS, QUICK, Problem

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ROOT = Path(__file__).resolve().parents[1]


def resident_kib(field: str) -> int:
    """VmRSS (resident now) or VmHWM (its high-water mark), in KiB."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"{STATUS} has no field {field}")


def why_not() -> str | None:
    """Why memory cannot be measured on this system, or None."""
    try:
        RESET.write_text("5")  # sets VmHWM back to VmRSS
        resident_kib("VmHWM")
    except OSError as error:
        return f"peak memory needs a writable {RESET}: {error}"
    return None


class Memory(NamedTuple):
    """MiB: at the peak of the first large call minus before it, result included; and what is kept
    for the calls after it."""

    extra: float
    kept: float


def measure_here(problem: Problem, contender: peers.Eager) -> Memory:
    module, example = problem.build()
    converted = contender.convert(module)
    x = example.to(memory_format=peers.FORMATS[contender.layout])
    with torch.no_grad():
        converted(x[..., :9, :9].contiguous(memory_format=peers.FORMATS[contender.layout]))
        kept = contender.keep(converted, x)
        RESET.write_text("5")
        before = resident_kib("VmRSS")
        converted(x)
        return Memory((resident_kib("VmHWM") - before) / 1024, kept / 2**20)


def measure(problem: Problem, contender: peers.Contender, threads: int) -> Memory | None:
    """Runs `measure_here` in a fresh process; None where it cannot be measured."""
    if not isinstance(contender, peers.Eager) or why_not() is not None:
        return None
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    place, ours = [*PROBLEMS, *QUICK].index(problem), int(isinstance(contender, peers.Ours))
    words = [str(place), str(ours), contender.layout, str(threads)]
    command = [sys.executable, "-m", "benchmarks.memory", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return Memory(*map(float, done.stdout.split()[-2:])) if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the extra and the kept memory, MiB.")
    parser.add_argument("problem", type=int, help="index into PROBLEMS + QUICK")
    parser.add_argument("ours", type=int, help="1 for aspp_ext, 0 for eager PyTorch")
    parser.add_argument("layout", choices=list(peers.FORMATS))
    parser.add_argument("threads", type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    contender = (peers.Ours if options.ours else peers.Eager)(options.layout)
    print(*measure_here([*PROBLEMS, *QUICK][options.problem], contender))


if __name__ == "__main__":
    main()
