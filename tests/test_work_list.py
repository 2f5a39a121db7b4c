# SPDX-License-Identifier: BSD-3-Clause
"""Work lists as the kernels walk them, product by product (in C++)."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None or not (CSRC / "cuda").is_dir():
        pytest.skip("needs a C++ compiler and the sources")
    path = tmp_path_factory.mktemp("work_list") / "check"
    flags = shlex.split(os.environ.get("CXXFLAGS", "-O1"))
    files = [TESTS / "work_list_check.cpp", CSRC / "cuda/work_list.cpp"]
    files += sorted((CSRC / "plan").glob("*.cpp"))
    subprocess.run([*compiler, "-std=c++20", *flags, *files, "-o", path], check=True)
    return path


@pytest.mark.parametrize("mode", [[], ["--planted"]], ids=["agrees", "notices faults"])
def test_work_lists(program: Path, mode: list[str]) -> None:
    run = subprocess.run([program, *mode], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
