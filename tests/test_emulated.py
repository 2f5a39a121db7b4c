# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels and their bindings on the CPU: the operators' own tests, with another library.

``ASPP_EXT_CUDA=emulate`` builds a libaspp_cpu.so in which the pyramids are the kernels of
csrc/cuda, run by csrc/cuda/emulation. What follows from that is marked with ``table.EMULATED``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ROOT / "build/emulated"


class Suite(NamedTuple):
    """Files, what of them, and which way the separable forward takes: "" for the one it chooses."""

    files: list[str]
    chosen: str = ""
    way: str = ""


PYRAMIDS = "not inference and not head"
"""What has CUDA kernels: the whole head is composed of these, which "head" is about."""
FORWARD = f"{PYRAMIDS} and separable and not backward"
# Each takes at most a minute and a half on one core.
SUITES = {
    "forward": Suite(["test_forward"], f"{PYRAMIDS} and not separable"),
    "separable": Suite(["test_forward"], f"{PYRAMIDS} and separable"),
    # The fused kernel, which is chosen for most of these, has no float64.
    "separable through memory": Suite(["test_forward"], f"{FORWARD} and not float64", "stored"),
    "tf32": Suite(["test_tf32"]),
    "calls": Suite(["test_emulated_calls", "test_layouts", "test_cuda_limits"]),
    "separable calls": Suite(["test_emulated_separable"]),
    "statistics": Suite(["test_emulated_statistics"]),
    "norm": Suite(["test_separable_norm"]),
    "head": Suite(["test_head_composed"], "not compile and not export"),
    "gradients": Suite(["test_backward", "test_second_order"], f"{PYRAMIDS} and not gradgradcheck"),
    "contract": Suite(["test_contract", "test_opcheck", "test_autocast", "test_fuzz"], PYRAMIDS),
    "system": Suite(["test_compile", "test_modules"], PYRAMIDS),
    "sizes and threads": Suite(["test_large", "test_threads"], PYRAMIDS),
}
SLOW = {"second gradients": Suite(["test_backward"], f"{PYRAMIDS} and gradgradcheck")}
each_suite = pytest.mark.parametrize(
    "name", [*SUITES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)


def run(arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ASPP_E")}
    environment |= {"ASPP_EXT_LIBRARY_DIR": str(LIBRARIES), "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment
    )


@pytest.fixture(scope="session")
def library() -> None:
    """Built where it is missing or older than the sources."""
    built = run(["setup.py", "-q", "build_ext", "--inplace"], ASPP_EXT_CUDA="emulate")
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    assert json.loads((LIBRARIES / "_build_info.json").read_text())["emulated"]


@pytest.mark.timeout(900)
@each_suite
def test_suite(name, library) -> None:
    suite = (SUITES | SLOW)[name]
    paths = [f"tests/{file}.py" for file in suite.files]
    marked = "not large and not gpu" + " and not slow" * (name not in SLOW)
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", marked, "-k", suite.chosen]
    done = run(["-m", "pytest", *options, *paths], ASPP_EXT_SEPARABLE=suite.way)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
