# SPDX-License-Identifier: BSD-3-Clause
"""GPUs that Triton believes in: the host code runs on the CPU's tensors, every launch is written
down, and nothing is compiled or launched.

What would be compiled is what the real calls ask for, so that no signature is written twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from aspp_ext.triton import target, work


class Gpu(NamedTuple):
    """A device as PyTorch and Triton describe it."""

    target: GPUTarget
    processors: int
    shared_bytes: int  # that a program may use

    @property
    def properties(self) -> SimpleNamespace:
        """What ``torch.cuda.get_device_properties`` says."""
        arch = self.target.arch
        numbers = {} if isinstance(arch, str) else {"major": arch // 10, "minor": arch % 10}
        return SimpleNamespace(
            gcnArchName=f"{arch}:sramecc+:xnack-",
            multi_processor_count=self.processors,
            shared_memory_per_block=self.shared_bytes,
            shared_memory_per_block_optin=self.shared_bytes,
            **numbers,
        )


GPUS = {
    "sm_80": Gpu(GPUTarget("cuda", 80, 32), 108, 166912),
    "sm_90": Gpu(GPUTarget("cuda", 90, 32), 132, 232448),
    "sm_100": Gpu(GPUTarget("cuda", 100, 32), 148, 232448),
    "sm_120": Gpu(GPUTarget("cuda", 120, 32), 170, 101376),
    "gfx942": Gpu(GPUTarget("hip", "gfx942", 64), 304, 65536),
}


class Launch(NamedTuple):
    """A launch: the kernel's name, its grid, its arguments by their names, its options."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    options: dict[str, Any]


class Compilation(NamedTuple):
    """What Triton was asked to compile: ``triton.compile``'s arguments."""

    source: Any
    target: GPUTarget
    options: dict[str, Any]

    @property
    def kernel(self) -> str:
        return self.source.fn.__name__

    @property
    def constants(self) -> dict[str, Any]:
        names = self.source.fn.arg_names
        return {names[path[0]]: value for path, value in self.source.constants.items()}


class _Kernel:
    """In the place of a compiled kernel."""

    function = packed_metadata = None

    def __init__(self, names: list[str], name: str, options: Any, launches: list[Launch]) -> None:
        self.names, self.name, self.options, self.launches = names, name, options, launches

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        arguments = dict(zip(self.names, rest[-len(self.names) :], strict=True))
        self.launches.append(Launch(self.name, (x, y, z), arguments, self.options))


class Device:
    """The active driver of Triton, and what has been asked of it."""

    def __init__(self, name: str) -> None:
        self.name, self.gpu = f"a pretended {name}", GPUS[name]
        self.launches: list[Launch] = []
        self.compilations: list[Compilation] = []

    @property
    def utils(self) -> Device:  # an attribute would keep it alive, and all arguments of launches
        return self

    def get_current_target(self) -> GPUTarget:
        return self.gpu.target

    def get_current_device(self) -> str:
        return self.name  # the key of a kernel's compiled forms

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": self.gpu.shared_bytes}

    def compile(self, src: Any, target: Any = None, options: Any = None, **_: Any) -> _Kernel:
        self.compilations.append(Compilation(src, target, dict(options)))
        return _Kernel(src.fn.arg_names, src.fn.__name__, dict(options), self.launches)

    def forget(self) -> None:
        """Kernels would otherwise go on as they were compiled here."""
        for function in {c.source.fn for c in self.compilations}:
            function.device_caches.pop(self.name)
            function.compile = triton.compiler.compile


@contextlib.contextmanager
def pretended(name: str) -> Iterator[Device]:
    """All tensors are on one of GPUS: what the operators of ``aspp_ext.triton`` launch there.

    Results are whatever was in their memory.
    """
    device, before = Device(name), driver._active
    properties = device.gpu.properties
    is_amd = device.gpu.target.backend == "hip"
    with (
        mock.patch.object(triton.compiler, "compile", device.compile),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.version, "hip", "6.4" if is_amd else None),
        mock.patch.object(work, "_entries", type(work._entries)()),
    ):
        driver.set_active(device)
        target.target_of.cache_clear()
        try:
            yield device
        finally:
            driver._active = before
            target.target_of.cache_clear()
    device.forget()
