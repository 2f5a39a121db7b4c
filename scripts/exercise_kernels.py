# SPDX-License-Identifier: BSD-3-Clause
"""Runs the calls of kernel_calls.py, made for compute-sanitizer: `python -m
scripts.exercise_kernels`, and with `--names` says which kernels they do not launch."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence

import torch

from aspp_ext import _native, _triton
from scripts.kernel_calls import FAMILIES, NARROW, VARIANTS, Call, calls_of, difference


def kernels_of(symbols: str) -> set[str]:
    """The mangled names of the kernels whose host stubs are among nm's lines."""
    stubs = re.findall(r"(?<!\d)(\d+)(__device_stub__\S+)", symbols)
    return {name[: int(length)].removeprefix("__device_stub_") for length, name in stubs}


def cuda_kernels() -> set[str]:
    """The kernels in libaspp_cuda.so; empty where that cannot be seen."""
    library = _native.library_dir() / "libaspp_cuda.so"
    if not library.exists() or not shutil.which("nm") or not shutil.which("c++filt"):
        return set()
    symbols = subprocess.run(["nm", str(library)], capture_output=True, text=True).stdout
    mangled = "\n".join(kernels_of(symbols))
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True).stdout
    return set(names.splitlines())


def triton_kernels() -> set[str]:
    """What aspp_ext.triton launches: its functions whose names end in "_kernel"."""
    from triton.runtime.jit import KernelInterface

    import aspp_ext.triton as package

    modules = [
        importlib.import_module(f"{package.__name__}.{module.name}")
        for module in pkgutil.iter_modules(package.__path__)
    ]
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, KernelInterface)
    }


def report_kernels(calls: Sequence[Call], implementation: str) -> None:
    """Names every kernel of an implementation that no call launches."""
    from benchmarks.gpu.device import Cuda

    device = Cuda()
    launched = {kernel.name for call in calls for kernel in device.kernels(call.run)}
    built = cuda_kernels() if implementation == "cuda" else triton_kernels()
    for name in sorted(built - launched):
        print(f"not launched: {name}")
    for name in sorted(n for n in launched if "aspp" in n or n in built):
        print(f"launched: {name}")
    print(f"{len(built & launched)} of {len(built)} {implementation} kernels launched")


def why_not(implementation: str, device: str) -> str | None:
    """What keeps the calls from running, or None."""
    if implementation == "triton":
        return _triton.refusal(torch.empty(1, 1, 1, 1, device=device), 1)
    return _native.cpu_missing or (_native.cuda_missing if device == "cuda" else None)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts.exercise_kernels", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--implementation", choices=list(FAMILIES), default="cuda")
    parser.add_argument("--quick", action="store_true", help="narrow shape, bfloat16")
    parser.add_argument("--names", action="store_true", help="also list the kernels launched")
    options = parser.parse_args(arguments)
    if (missing := why_not(options.implementation, options.device)) is not None:
        print(missing)
        return 1
    wrong, calls = 0, []
    for variant in VARIANTS[options.implementation]:
        if options.quick and (variant.shape, variant.dtype) != (NARROW, torch.bfloat16):
            continue
        for call in calls_of(variant, options.implementation, options.device):
            calls.append(call)
            text = difference(call.run(), call, variant.dtype)
            if text:
                print(f"WRONG {call.name}: {text}", flush=True)
            wrong += text is not None
    if options.names and options.device == "cuda":
        report_kernels(calls, options.implementation)
    print(f"{len(calls) - wrong} of {len(calls)} calls agree")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
