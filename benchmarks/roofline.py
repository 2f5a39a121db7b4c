# SPDX-License-Identifier: BSD-3-Clause
"""What a problem must cost at least: useful arithmetic, compulsory traffic, the machine's ceilings.

Useful FLOPs count live taps only: a tap that falls into the zero padding is not work, so skipping
it earns no credit and multiplying it costs. Minimal filtering multiplies less often than there are
live taps and may be faster than the roofline. Compulsory bytes count every operand and result once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from aspp_ext.testing.timing import fastest_seconds
from benchmarks.problems import Problem

ITEM_BYTES = {"float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class Work:
    """Useful floating-point operations and compulsory bytes of one call."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of this machine: FLOP/s by dtype and copy bandwidth in bytes/s."""

    flops: dict[str, float]
    bandwidth: float

    def seconds(self, work: Work, dtype: str) -> float:
        """The roofline: the longer of arithmetic at peak speed and traffic at copy speed."""
        return max(work.flops / self.flops[dtype], work.bytes / self.bandwidth)

    def raised_to(self, other: Ceilings) -> Ceilings:
        """The higher of two measurements of the same machine, ceiling by ceiling."""
        peaks = {name: max(peak, other.flops[name]) for name, peak in self.flops.items()}
        return Ceilings(peaks, max(self.bandwidth, other.bandwidth))


def live_taps(size: int, kernel: int, rate: int) -> int:
    """Sum over the `kernel` taps of the positions of an axis where the tap falls inside it."""
    half = kernel // 2
    return sum(max(0, size - abs(tap - half) * rate) for tap in range(kernel))


def pyramid_work(problem: Problem) -> tuple[float, float]:
    """(useful FLOPs, weight elements) of the 1x1 branch and the atrous branches together."""
    pixels = problem.height * problem.width
    product = problem.channels * problem.out_channels
    flops, weights = 2.0 * product * pixels, float(product)
    for rate in problem.rates:
        live = live_taps(problem.height, 3, rate) * live_taps(problem.width, 3, rate)
        if problem.separable:
            flops += 2.0 * problem.channels * live + 2.0 * product * pixels
            weights += 9 * problem.channels + product
        else:
            flops += 2.0 * product * live
            weights += 9 * product
    return problem.batch * flops, weights


def work_of(problem: Problem) -> Work | None:
    """Useful FLOPs and compulsory bytes of one call; None for whole models (not counted)."""
    if problem.level == "model":
        return None
    pixels = problem.batch * problem.height * problem.width
    flops, weights = pyramid_work(problem)
    concatenated = problem.out_channels * (1 + len(problem.rates))
    outputs = pixels * concatenated
    if problem.level == "module":
        pooled = problem.channels * problem.out_channels
        projected = problem.out_channels * problem.out_channels
        flops += pixels * problem.channels
        flops += 2.0 * problem.batch * (pooled + projected)
        flops += 2.0 * pixels * concatenated * problem.out_channels
        weights += pooled + projected + concatenated * problem.out_channels
        outputs = pixels * problem.out_channels
    inputs = pixels * problem.channels
    elements = inputs + weights + outputs
    if problem.mode == "training":
        flops *= 3  # the gradients of input and weights each repeat the forward's products
        elements = 3 * inputs + 3 * weights + 2 * outputs  # read twice, their gradients written
    return Work(flops, elements * ITEM_BYTES[problem.dtype])


def measure_peak(dtype: torch.dtype, budget_s: float) -> float:
    """FLOP/s of the fastest large matrix product PyTorch offers: matmul or 1x1 convolution."""
    rows, inner, columns = 4096, 1024, 1024
    a = torch.randn(rows, inner).to(dtype)
    b = torch.randn(inner, columns).to(dtype)
    image = torch.randn(1, inner, 64, 64).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(columns, inner, 1, 1).to(dtype, memory_format=torch.channels_last)
    with torch.no_grad():
        products = (lambda: a @ b, lambda: F.conv2d(image, weight))
        seconds = min(fastest_seconds(product, budget_s) for product in products)
    return 2.0 * rows * inner * columns / seconds


def measure_bandwidth(budget_s: float, megabytes: int = 256) -> float:
    """Bytes/s (read + written) of a large copy."""
    source = torch.ones(megabytes * 2**18)  # float32
    target = torch.empty_like(source)
    return 2.0 * source.numel() * 4 / fastest_seconds(lambda: target.copy_(source), budget_s)


def measure_ceilings(dtypes: Iterable[str], budget_s: float = 0.4) -> Ceilings:
    """Measures this machine's peak for each dtype and its copy bandwidth, `budget_s` a try."""
    peaks = {name: measure_peak(getattr(torch, name), budget_s) for name in sorted(set(dtypes))}
    return Ceilings(peaks, measure_bandwidth(budget_s))
