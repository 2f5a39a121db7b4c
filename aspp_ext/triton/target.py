# SPDX-License-Identifier: BSD-3-Clause
"""What kernels are compiled for, as far as the choice of tiles depends on it."""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch

from .._triton import interpreted

INTERPRETER_PROCESSORS = 13
"""Of the pretended device: more than small problems have tiles, so that sums are cut there too."""


class Target(NamedTuple):
    """A device: its architecture ("sm_90", "gfx942" or "interpreter"), the multiprocessors, and
    the bytes of shared memory that a program may use."""

    device: torch.device
    architecture: str
    processors: int
    shared_bytes: int

    @property
    def is_interpreter(self) -> bool:
        return self.architecture == "interpreter"

    def is_capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@functools.cache
def target_of(device: torch.device) -> Target:
    if interpreted:
        return Target(device, "interpreter", INTERPRETER_PROCESSORS, 1 << 30)
    properties = torch.cuda.get_device_properties(device)
    processors = properties.multi_processor_count
    if torch.version.hip is not None:
        architecture = properties.gcnArchName.split(":")[0]
        return Target(device, architecture, processors, properties.shared_memory_per_block)
    architecture = f"sm_{properties.major}{properties.minor}"
    shared_bytes: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Target(device, architecture, processors, shared_bytes)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Where kernels launched inside run: Triton takes the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
