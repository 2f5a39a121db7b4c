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
from collections.abc import Iterable
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
    """Of the sources that the library was built from, and of the Python around the kernels as it
    lies here. Empty where the build has left no digests."""
    built = _native.read_build_info().get("sources", {})
    if not {"cpu", "cuda", "plan"} <= set(built):
        return {}
    folders = {"cpu": ("ops",), "cuda": ("ops",), "triton": ("ops", "triton")}
    digests = {}
    for name, places in folders.items():
        digest = hashlib.sha256(built.get(name, built["plan"]).encode())
        for path in sorted(path for place in places for path in (PACKAGE / place).glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
        digests[name] = digest.hexdigest()[:16]
    return digests


def runs_natively(architecture: str, built: Iterable[str]) -> bool:
    """Whether a device like "sm_90" finds machine code in what was built for ("9.0a", "8.0+PTX"),
    and no PTX has to be compiled for it: that of its major version, and of its own where the name
    ends in "a"."""
    major, minor = int(architecture[3:-1]), int(architecture[-1])
    for each in built:
        name = each.removesuffix("+PTX")
        own_major, own_minor = map(int, name.rstrip("af").split("."))
        fits = own_minor == minor if name.endswith("a") else own_minor <= minor
        if own_major == major and fits:
            return True
    return False


def _kernels(architecture: str) -> dict[str, str]:
    """The digests; what PTX is compiled to is another kernel."""
    digests = dict(kernel_digests())
    built = _native.read_build_info().get("architectures", ())
    if "cuda" in digests and architecture.startswith("sm_"):
        digests["cuda"] += "" if runs_natively(architecture, built) else "-ptx"
    return digests


def environment_of(device: torch.device) -> Environment:
    """That of a CUDA device, which this touches, or of the CPU."""
    on_cpu = device.type == "cpu"
    gpu = None if on_cpu else torch.cuda.get_device_properties(device)
    architecture = _cpu_architecture() if gpu is None else _gpu.architecture(device)
    return Environment(
        device=_cpu_name() if gpu is None else gpu.name,
        architecture=architecture,
        processors=os.cpu_count() or 1 if gpu is None else gpu.multi_processor_count,
        driver="" if on_cpu else _driver(),
        torch=torch.__version__,
        cuda=torch.version.cuda or torch.version.hip or "",
        cudnn="" if on_cpu else str(torch.backends.cudnn.version() or ""),
        triton=_triton.version or "",
        compiler=_compiler(),
        kernels=_kernels(architecture),
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
