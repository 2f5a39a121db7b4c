# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA kernels and their bindings on the CPU: the operators' own tests, with another library.

``ASPP_EXT_CUDA=emulate`` builds a libaspp_cpu.so in which the pyramids, dense and separable, are
the kernels of csrc/cuda, run by csrc/cuda/emulation. What follows from that is marked with
``table.EMULATED``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ROOT / "build/emulated"
PYRAMIDS = "not inference and not head"
# name: files and what of them; together they take four minutes on two cores
SUITES = {
    "forward": (["test_forward"], f"{PYRAMIDS} and not separable"),
    "separable forward": (["test_forward"], "separable"),
    "tf32": (["test_tf32"], ""),
    "calls": (["test_emulated_calls", "test_layouts", "test_cuda_limits"], ""),
    "separable calls": (["test_emulated_separable"], ""),
    "statistics": (["test_emulated_statistics"], ""),
    "norm": (["test_separable_norm"], ""),
    "head": (["test_head_composed"], "not compile and not export"),
    "gradients": (["test_backward", "test_second_order"], f"{PYRAMIDS} and not gradgradcheck"),
    "contract": (["test_contract", "test_opcheck", "test_autocast", "test_fuzz"], PYRAMIDS),
    "system": (["test_compile", "test_large", "test_threads", "test_modules"], PYRAMIDS),
}
SLOW = {"second gradients": (["test_backward"], f"{PYRAMIDS} and gradgradcheck")}
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
    files, chosen = (SUITES | SLOW)[name]
    paths = [f"tests/{file}.py" for file in files]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not large and not gpu", "-k", chosen]
    if name not in SLOW:
        options[5] += " and not slow"
    done = run(["-m", "pytest", *options, *paths])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
