# SPDX-License-Identifier: BSD-3-Clause
"""Triton's kernels on the CPU: the operators' own tests on what Triton's interpreter computes.

``TRITON_INTERPRET=1`` has to be set before Triton is imported, hence other processes. What follows
from it there is marked with ``table.INTERPRETED``.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INTERPRET = {"TRITON_INTERPRET": "1", "ASPP_EXT_BACKEND": "triton"}
EXACT = "test_integers_are_exact and float32 and not kernel_63x63"
LOW = "test_integers_are_exact and not head"
# name: files and what of them, the longest first; what is left out is in `make interpret`
SUITES = {
    "kernels": (["interpreted_kernels", "interpreted_faults", "interpreted_modules"], ""),
    "gradients": (["forward"], f"{EXACT} and pyramid_grad"),
    "separable gradients": (["forward"], f"{EXACT} and (separable_backward_between or "
        "separable_backward and (prime_sizes or one_pixel or rate_above))"),
    "calls": (["forward", "layouts", "contract", "opcheck", "autocast"],
        "test_epilogue or test_between or one_dimension or test_head or not_written or infinity "
        "or reaches_exactly and kernel_5x5 and float32 and not backward "
        "or reaches_every and rate_above or 3-4x6-5-bfloat16 or 1-1x6-16-float32 "
        "or test_public_functions or test_direct_operators or test_with_gradients "
        "or test_every_dtype and bfloat16 or real_strides and (x_sliced or one_pixel) "
        "or direct_operator"),
    "forward": (["forward"], f"{EXACT} and pyramid and not grad and not separable"),
    "separable": (["forward"], f"{EXACT} and separable and not backward and not head"),
    "derivatives": (["backward", "autocast", "compile"],
        "only_what_requires or memory_format or low_precision or any_layout or sum_backward "
        "or shared_tensor or nothing_is_recorded or gradients_are_those "
        "or once_for_all_sizes and aot_eager"),
    "error law": (["forward"], "test_error_law and prime_sizes and not head"),
    "bfloat16": (["forward"], f"{LOW} and bfloat16 and (prime_sizes or outputs_not_of_16 or "
        "rate_above or x_channels_last or weights_channels_last)"),
    "float16": (["forward"], f"{LOW} and float16 and not bfloat16 and prime_sizes"),
    "head": (["forward"], f"{EXACT} and head and (aspp or prime_sizes or one_pixel)"),
}  # fmt: skip
SLOW = {
    "many taps": (["forward"], "test_integers_are_exact and float32 and kernel_63x63"),
}


def run(name: str) -> subprocess.CompletedProcess[str]:
    files, chosen = (SUITES | SLOW)[name]
    paths = [f"tests/test_{file}.py" for file in files]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ASPP_E")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **INTERPRET}
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not large and not gpu", "-k", chosen]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *paths],
        **{"capture_output": True, "text": True, "cwd": ROOT, "env": environment},
    )


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future]]:
    """The chosen suites, as many at a time as there are processors."""
    names = [
        item.callspec.params["name"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == test_suite.__name__
        and item.module is request.module
    ]  # fmt: skip
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield {name: pool.submit(run, name) for name in names}
        pool.shutdown(cancel_futures=True)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name", [*SUITES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_suite(name, runs) -> None:
    done = runs[name].result()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
