# SPDX-License-Identifier: BSD-3-Clause
"""The kernels of narrower processors, on this one: ``ASPP_EXT_ISA`` steps down."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
LADDER = ["baseline", "avx2", "avx512", "avx512bf16"]


def run(arguments: list[str], isa: str | None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("ASPP_EXT_ISA", None)
    if isa is not None:
        environment["ASPP_EXT_ISA"] = isa
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=280,
    )


def isa_of_this_machine(limit: str | None = None) -> str:
    code = "import torch, aspp_ext; print(torch.ops.aspp_ext.cpu_isa())"
    return run(["-c", code], limit).stdout.strip().removeprefix("isa_")


def narrower() -> list[str]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    return LADDER[: LADDER.index(torch.ops.aspp_ext.cpu_isa().removeprefix("isa_"))]


@pytest.mark.slow
@pytest.mark.parametrize("isa", LADDER[:3])
def test_exactness_table(isa) -> None:
    if isa not in narrower():
        pytest.skip(f"{isa} is what the other tests ran, or this processor lacks it")
    assert isa_of_this_machine(isa) == isa
    tests = ["tests/test_forward.py", "-k", "integers or law or nan_reaches_exactly"]
    done = run(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests], isa)
    assert done.returncode == 0, done.stdout[-3000:]


def test_an_unknown_name_does_not_raise_the_ceiling() -> None:
    assert isa_of_this_machine("avx9000") in LADDER
    assert isa_of_this_machine("") == isa_of_this_machine()
