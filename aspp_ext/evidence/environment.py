# SPDX-License-Identifier: BSD-3-Clause
"""What a verdict depends on besides the call: the device, what drives it, and our own kernels."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import platform
import re
from pathlib import Path

import torch

from .. import _gpu, _native, _triton

PACKAGE = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Environment:
    """One device of one machine, as far as it decides what is right and what is fast."""

    device: str  # "NVIDIA H200", or the processor's model
    architecture: str  # "sm_90", "gfx942"; of a processor "x86_64 avx512"
    processors: int  # multiprocessors, or cores
    driver: str
    torch: str
    cuda: str
    cudnn: str
    triton: str
    compiler: str  # of the native library, and of which architectures its kernels are
    kernels: dict[str, str]  # implementation -> digest of its sources

    @property
    def key(self) -> str:
        """A digest of all of it."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """Of its files, without the ending."""
        return f"{hyphenated(self.device)[:60]}-{self.key}"


def hyphenated(name: str) -> str:
    """Lower case, words joined by hyphens."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def processor() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = re.sub(r"\((R|TM)\)|CPU|Processor|@.*", "", line.split(":", 1)[1])
                return " ".join(name.split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        text = ""
    found = re.search(r"Kernel Module\D*([\d.]+)", text)
    return found[1] if found else "unknown"


@functools.cache
def kernel_digests() -> dict[str, str]:
    """Of the sources that the library was built from, and of Triton's kernels as they lie here.

    Empty where the build has left no digests.
    """
    built = _native.read_build_info().get("sources", {})
    if not {"cpu", "cuda", "plan"} <= set(built):
        return {}
    digest = hashlib.sha256(built["plan"].encode())
    for path in sorted((PACKAGE / "triton").glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return {"cpu": built["cpu"], "cuda": built["cuda"], "triton": digest.hexdigest()[:16]}


def environment_of(device: torch.device) -> Environment:
    """That of a CUDA device, which this touches, or of the CPU."""
    on_cpu = device.type == "cpu"
    gpu = None if on_cpu else torch.cuda.get_device_properties(device)
    return Environment(
        device=_cpu_name() if gpu is None else gpu.name,
        architecture=_cpu_architecture() if gpu is None else _gpu.architecture(device),
        processors=os.cpu_count() or 1 if gpu is None else gpu.multi_processor_count,
        driver="" if on_cpu else _driver(),
        torch=torch.__version__,
        cuda=torch.version.cuda or torch.version.hip or "",
        cudnn="" if on_cpu else str(torch.backends.cudnn.version() or ""),
        triton=_triton.version or "",
        compiler=_compiler(),
        kernels=kernel_digests(),
    )


def _compiler() -> str:
    built = _native.read_build_info()
    parts = [built.get("compiler", "")]
    if cuda := built.get("cuda"):
        parts.append(f"CUDA {cuda} for {', '.join(built['architectures'])}")
    return ", ".join(parts)


def _cpu_name() -> str:
    kinds = {"emulated": _native.emulated, "interpreted": _triton.interpreted}
    return ", ".join([processor(), *(kind for kind, is_so in kinds.items() if is_so)])


def _cpu_architecture() -> str:
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability().lower()}"
