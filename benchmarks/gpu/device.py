# SPDX-License-Identifier: BSD-3-Clause
"""Where a GPU benchmark runs: `Cuda`, or `Host`, which walks the same steps on the CPU.

Nothing that `Host` writes can be taken for a GPU's result: its device is called "dry run".
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aspp_ext.testing import timing
from benchmarks import machine

Call = Callable[[], object]
DRY_RUN = "dry run"
MARK = "spin_kernel"


@dataclass(frozen=True)
class Kernel:
    """One launch as the profiler saw it."""

    name: str
    microseconds: float
    grid: str = ""
    block: str = ""
    registers: int = 0
    shared_bytes: int = 0


def trace_of(call: Call, activity: torch.profiler.ProfilerActivity) -> list[dict[str, Any]]:
    """The profiler's events of one call, as its trace file has them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        with torch.profiler.profile(activities=[activity]) as profiler:
            call()
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def launches(events: Iterable[dict[str, Any]], categories: Iterable[str]) -> list[Kernel]:
    """The events of some categories, in the order of their start."""
    wanted = [event for event in events if event.get("cat") in categories]
    found = []
    for event in sorted(wanted, key=lambda event: event["ts"]):
        more = event.get("args", {})
        sizes = ["x".join(map(str, more.get(key, []))) for key in ("grid", "block")]
        found.append(
            Kernel(
                event["name"],
                float(event.get("dur", 0.0)),
                *sizes,
                int(more.get("registers per thread", 0)),
                int(more.get("shared memory", 0)),
            )
        )
    return found


class Host:
    """The CPU in the place of a GPU."""

    kind = "cpu"
    backends = ("cpu", "triton")  # the implementations of aspp_ext that are timed

    def facts(self) -> dict[str, Any]:
        """The columns that are the same in every row of a run."""
        versions = {"cuda": "", "cudnn": "", "triton": machine.version("triton")}
        facts = {**machine.facts(), **versions, "onnxruntime": "", "openvino": ""}
        return {**facts, "device": DRY_RUN, "architecture": "none"}

    def stopwatch(self, call: Call) -> tuple[float, float]:
        return timing.BY_WALL_CLOCK(call)

    def flusher(self) -> Call:
        """Returns a call after which the caches hold nothing of what was used before."""
        return timing.cache_flusher(16)

    def synchronize(self) -> None:
        pass

    def release(self) -> None:
        """Gives back what the allocator keeps for later."""

    def peak_bytes(self, call: Call) -> int | None:
        """Memory at the peak of a call minus before it, result included; None: not known here."""
        return None

    def kernels(self, call: Call) -> list[Kernel]:
        events = trace_of(call, torch.profiler.ProfilerActivity.CPU)
        return launches(events, ["cpu_op"])

    def start_counting(self) -> None:
        """From here on a profiler outside this process counts."""

    def stop_counting(self) -> None:
        pass

    def mark(self) -> None:
        """Launches a kernel named `MARK`, by which a profiler's list of launches is divided."""


class Cuda(Host):
    """The first CUDA device."""

    kind = "cuda"
    backends = ("cuda", "triton")

    def __init__(self) -> None:
        self.properties = torch.cuda.get_device_properties(0)
        self.by_events = timing.CudaStopwatch()

    def facts(self) -> dict[str, Any]:
        major, minor = self.properties.major, self.properties.minor
        return {
            **super().facts(),
            "device": self.properties.name,
            "architecture": f"sm_{major}{minor}",
            "cuda": torch.version.cuda or "",
            "cudnn": str(torch.backends.cudnn.version() or ""),
        }

    def stopwatch(self, call: Call) -> tuple[float, float]:
        return self.by_events(call)

    def flusher(self) -> Call:
        return timing.l2_flusher(torch.device("cuda"))

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def release(self) -> None:
        self.by_events.host_s.clear()
        torch.cuda.empty_cache()

    def peak_bytes(self, call: Call) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def kernels(self, call: Call) -> list[Kernel]:
        def finished() -> None:
            call()
            torch.cuda.synchronize()

        events = trace_of(finished, torch.profiler.ProfilerActivity.CUDA)
        return launches(events, ["kernel", "gpu_memcpy", "gpu_memset"])

    def start_counting(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()

    def stop_counting(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()

    def mark(self) -> None:
        torch.cuda._sleep(1)


def device_named(kind: str) -> Host:
    """The device that a command line names: "cuda", or "cpu" for a dry run.

    Raises:
        SystemExit: PyTorch sees no CUDA device.
    """
    if kind == "cpu":
        torch.set_num_threads(1)
        return Host()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device, and PyTorch sees none here")
    return Cuda()
