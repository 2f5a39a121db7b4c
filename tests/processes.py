# SPDX-License-Identifier: BSD-3-Clause
"""New processes of this Python. None has a time limit: a slow machine is only slow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_python(*arguments: str, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """In the repository, with these environment variables; None takes one away."""
    wanted = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    env = {name: value for name, value in wanted.items() if value is not None}
    argv = [sys.executable, *arguments]
    return subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=env)


def said_by_python(code: str, **variables: str | None) -> str:
    """What a program prints, which has to succeed."""
    done = run_python("-c", code, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def isa(limit: str | None = None) -> str:
    """What the CPU's kernels run under ``ASPP_EXT_ISA``."""
    code = "import torch, aspp_ext; print(torch.ops.aspp_ext.cpu_isa())"
    return said_by_python(code, ASPP_EXT_ISA=limit).removeprefix("isa_")
