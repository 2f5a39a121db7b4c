# SPDX-License-Identifier: BSD-3-Clause
"""Every test: a fixed seed, NaN in uninitialised memory, and PyTorch's global state put back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import interpreting
import pytest
import torch

from aspp_ext import _triton
from aspp_ext.testing import nan_poison

LARGE_GIB = 12


def available_gib() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    return 0.0


def pytest_configure() -> None:
    if _triton.interpreted:
        interpreting.quicken()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = {}
    if not torch.cuda.is_available():
        absent["gpu"] = "no CUDA device"
    if available_gib() < LARGE_GIB:
        absent["large"] = f"less than {LARGE_GIB} GiB of memory free"
    for item in items:
        for marker, reason in absent.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    """Global state a test may change does not reach the next one.

    One thread is quicker on these sizes; test_threads.py compares the bits with two threads'.
    """
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), nan_poison():
        torch.manual_seed(0)
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """``torch.compile`` without what earlier tests left in its caches."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
