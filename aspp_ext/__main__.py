# SPDX-License-Identifier: BSD-3-Clause
"""`python -m aspp_ext`: what was built, what this machine has, and which implementation runs.

`python -m aspp_ext verify` finds out which are right and fast here: :mod:`aspp_ext.verify`.
`python -m aspp_ext fuse` shows what fuse makes of a model: :mod:`aspp_ext.fuse.command`.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from . import __version__, _gpu, _native, _triton, dispatch
from ._native import read_build_info
from .evidence import rulings, store

Row = tuple[str, str]


def describe_versions() -> Iterator[Row]:
    yield "aspp_ext", f"{__version__} in {Path(__file__).parent}"
    yield "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    yield "triton", _triton.version or "not installed"


def describe_build() -> Iterator[Row]:
    info = read_build_info()
    if not info:
        yield "build", "no native library was built; `make build` builds them"
        return
    yield "compiler", info["compiler"]
    yield "headers", f"torch {info['torch']}; loads in torch 2.11 and newer"
    yield "ISAs", ", ".join(isa.removeprefix("isa_") for isa in info["isas"])
    if info["cuda"]:
        yield "nvcc", f"CUDA {info['cuda']} for {', '.join(info['architectures'])}"
    else:
        yield "nvcc", "not used"


def describe_libraries() -> Iterator[Row]:
    yield "libaspp_cpu.so", _native.cpu_missing or f"loaded, runs {_native.picked_isa()}"
    yield "libaspp_cuda.so", _native.cuda_missing or "loaded"
    try:
        importlib.import_module("aspp_ext._plan")
        yield "_plan", "loaded"
    except ImportError as error:
        yield "_plan", f"not loaded: {error}"
    how = "interprets its kernels" if _triton.interpreted else "compiles its kernels"
    yield "triton", _triton.missing or how


def describe_devices() -> Iterator[Row]:
    yield "cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        size = f"{gpu.multi_processor_count} SMs, {gpu.total_memory / 2**30:.0f} GiB"
        architecture = _gpu.architecture(torch.device("cuda", index))
        yield f"cuda:{index}", f"{gpu.name}, {architecture}, {size}"
    if not torch.cuda.device_count():
        yield "cuda", "no device"


def describe_environment() -> Iterator[Row]:
    for name in sorted(os.environ):
        if name.startswith("ASPP_EXT_"):
            yield name, os.environ[name]


def describe_verified(device: str) -> Iterator[Row]:
    """Each cell of which something was seen: the verdict, the speeds, where that is written."""
    found = rulings.known(device)
    for cell, seen in sorted(found.items()):
        speeds = [f"{size} {s.ratio:.2f}x ({s.says})" for size, (s, _) in seen.speeds.items()]
        why = [seen.verdict.why] if seen.verdict.why else []
        yield cell.title, ", ".join([seen.verdict.result, *speeds, *why, f"on {seen.source}"])
    if found:
        yield "fingerprint", f"{rulings.fingerprint(device)}, the same where processes choose alike"
    elif store.is_off():
        yield store.VARIABLE, "off: nothing runs unasked that is not proven everywhere"
    else:
        yield device, f"nothing yet; `{rulings.COMMAND} --device {device}` finds out"


def describe_implementations(device: str) -> Iterator[Row]:
    for op, implementation, reason in dispatch.report(device):
        yield f"{op}: {implementation}", reason or "can run"


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["fuse"]:
        from .fuse.command import main as fuse

        return fuse(arguments)
    if arguments:
        from .verify.command import main as verify

        return verify(arguments)
    describe()
    return 0


def describe() -> None:
    sections = {
        "Versions": describe_versions(),
        "Build": describe_build(),
        "Libraries": describe_libraries(),
        "Devices": describe_devices(),
        "Environment": describe_environment(),
    }
    for name in ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))):
        sections[f"Seen on {name}"] = describe_verified(name)
        sections[f"Implementations on {name}"] = describe_implementations(name)
    for title, section in sections.items():
        if rows := list(section):
            width = max(len(name) for name, _ in rows)
            print(f"{title}\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
