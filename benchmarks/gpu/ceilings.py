# SPDX-License-Identifier: BSD-3-Clause
"""What a device reaches at best, on random data: a large matrix product and a large copy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch

from aspp_ext.testing.timing import fastest_seconds
from benchmarks.gpu.device import Host
from benchmarks.roofline import Ceilings

SIZES = {"cuda": (8192, 2**30), "cpu": (256, 2**20)}  # side of the matrices, elements of the copy


def torch_dtype(name: str) -> torch.dtype:
    return torch.float32 if name == "tf32" else getattr(torch, name)


@contextlib.contextmanager
def products_in(name: str) -> Iterator[None]:
    """float32 products are rounded to tf32 inside, by every contender, only where `name` says so.

    PyTorch's own default is tf32 in cuDNN's convolutions and float32 in matrix products.
    """
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def peak_flops(device: Host, name: str, budget_s: float) -> float:
    """FLOP/s of the fastest large matrix product."""
    side = SIZES[device.kind][0]
    a, b = (torch.randn(side, side, device=device.kind).to(torch_dtype(name)) for _ in range(2))
    with products_in(name):
        seconds = fastest_seconds(lambda: a @ b, budget_s, stopwatch=device.stopwatch)
    return 2.0 * side**3 / seconds


def copy_bandwidth(device: Host, budget_s: float) -> float:
    """Bytes/s (read + written) of a large copy."""
    source = torch.randn(SIZES[device.kind][1], device=device.kind).to(torch.bfloat16)
    target = torch.empty_like(source)
    copy = lambda: target.copy_(source)  # noqa: E731
    return 4.0 * source.numel() / fastest_seconds(copy, budget_s, stopwatch=device.stopwatch)


def measure_ceilings(device: Host, dtypes: Iterable[str], budget_s: float = 0.3) -> Ceilings:
    """The peak for each dtype and the copy bandwidth, `budget_s` a try."""
    peaks = {name: peak_flops(device, name, budget_s) for name in sorted(set(dtypes))}
    return Ceilings(peaks, copy_bandwidth(device, budget_s))
