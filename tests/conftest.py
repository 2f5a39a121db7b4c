# SPDX-License-Identifier: BSD-3-Clause
"""Every test: a fixed seed, NaN in uninitialised memory, and PyTorch's global state put back."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import interpreting
import pytest
import selection
import torch

from aspp_ext.evidence import rulings, store
from aspp_ext.ops.separable_choice import separable_way
from aspp_ext.testing import nan_poison

os.environ[store.VARIABLE] = "off"  # what is known of a developer's machine decides nothing here

try:
    import hypothesis
except ImportError:  # where only the tests for a GPU run
    pass
else:  # no limit on how long an example takes, and none on how long it takes to draw some
    hypothesis.settings.register_profile(
        "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("untimed")

LARGE_GIB = 12


def available_gib() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    return 0.0


pytest_addoption = selection.add_options
pytest_terminal_summary = selection.write_counts
pytest_report_teststatus = pytest.hookimpl(tryfirst=True)(selection.status_of_late)
pytest_runtest_setup = pytest.hookimpl(tryfirst=True)(selection.skip_when_out_of_time)


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem() -> Generator[None, Any, Any]:
    made = yield
    selection.check(made if isinstance(made, list) else [])
    return made


def pytest_configure(config: pytest.Config) -> None:
    # What fails on purpose must not leave its memory among the sources, as some systems have it.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    for line in selection.MARKERS.replace("\n  ", " ").strip().splitlines():
        config.addinivalue_line("markers", line)
    is_worker = hasattr(config, "workerinput")  # whose reports come to the process that began
    if config.option.passed and not is_worker:
        config.pluginmanager.register(selection.Passed(config.option.passed))
    if selection.KERNELS == "interpreted":
        interpreting.quicken()


def pytest_report_header(config: pytest.Config) -> str:
    without = "" if torch.cuda.is_available() else "; without a CUDA device: no test for one"
    return f"kernels: {selection.KERNELS}{without}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    selection.choose(config, items)
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
def isolated(request: pytest.FixtureRequest) -> Iterator[None]:
    """Global state a test may change does not reach the next one.

    One thread is quicker on these sizes; `make prove` tries other numbers.
    """
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), nan_poison():
        torch.manual_seed(0)
        torch.set_num_threads(request.config.option.threads)
        yield
    rulings.forget()
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture
def go() -> Iterator[Callable[[str], None]]:
    """Makes CUDA's separable forward go a way, "fused" or "stored", from here on in the test."""
    with contextlib.ExitStack() as stack:
        yield lambda way: stack.enter_context(separable_way(way))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """``torch.compile`` without what earlier tests left in its caches."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
