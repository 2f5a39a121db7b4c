# SPDX-License-Identifier: BSD-3-Clause
"""What ``make test`` and ``make prove`` run, step by step: the one list of the project's proofs.

A step is a process with an environment of its own. Which tests are for it, their markers say
(``tests/selection.py``); no step names a test.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EMULATED, SANITIZED = "build/emulated", "build/sanitized"
EMULATED_SANITIZED, EVERY_ARCHITECTURE = "build/emulated-sanitized", "build/architectures"
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512bf16")
SANITIZE = (
    "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
)
INTERPRET = {"TRITON_INTERPRET": "1", "ASPP_EXT_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
LATE = "out of time"
"""The outcome of tests that would have come later than their step's time allows."""


@dataclass(frozen=True)
class Step:
    """``minutes`` are what it takes on two cores; ``command`` is what ``python`` is given."""

    name: str
    minutes: float
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    """The steps that build what this one runs."""
    why_not: str | None = None
    """Why it cannot run on this machine."""

    @property
    def is_suite(self) -> bool:
        return self.command[:2] == ("-m", "pytest")


def suite(
    name: str, minutes: float, options: str, needs: str = "", why: str | None = None, **env: str
) -> Step:
    command = ("-m", "pytest", "-q", "--disable-warnings", *options.split())
    return Step(name, minutes, command, env, ("build", *filter(None, [needs])), why)


def library(
    name: str, minutes: float, folder: str = "", why: str | None = None, **environment: str
) -> Step:
    """A build of the libraries, where the package looks for them or in a folder of their own."""
    command = ("setup.py", "-q", "build_ext", "--inplace")
    wanted = {"ASPP_EXT_LIBRARY_DIR": folder, **environment} if folder else environment
    return Step(name, minutes, command, wanted, why_not=why)


def sanitizing(folder: str) -> dict[str, str]:
    """libstdc++ is loaded first, too: without it an exception aborts inside ASan's interceptor. A
    null allocation is what the tests of sizes beyond memory wait for."""
    names = [f"-print-file-name=lib{name}.so" for name in ("asan", "ubsan", "stdc++")]
    paths = [subprocess.check_output(["g++", name], text=True).strip() for name in names]
    return {
        "ASPP_EXT_LIBRARY_DIR": folder,
        "LD_PRELOAD": " ".join(paths),
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    }


def this_instruction_set() -> str:
    code = "import torch, aspp_ext; print(torch.ops.aspp_ext.cpu_isa())"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ASPP_")}
    argv = [sys.executable, "-c", code]
    try:
        said = subprocess.check_output(argv, text=True, cwd=ROOT, env=environment)
    except subprocess.CalledProcessError:
        sys.exit("which instruction set is this machine's only the library can say: make build")
    return said.strip().removeprefix("isa_")


def instruction_sets() -> list[Step]:
    """The kernels of narrower processors, on this one."""
    own, found = this_instruction_set(), []
    for isa in INSTRUCTION_SETS[:-1]:
        narrower = INSTRUCTION_SETS.index(isa) < INSTRUCTION_SETS.index(own)
        why = None if narrower else f"the other steps run {own}"
        found.append(suite(f"isa {isa}", 3.3, "--setting=isa", why=why, ASPP_EXT_ISA=isa))
    return found


def test_steps() -> list[Step]:
    """Those of ``make test``."""
    triton = None if importlib.util.find_spec("triton") else "there is no Triton"
    emulated = {"ASPP_EXT_LIBRARY_DIR": EMULATED}
    return [
        library("build", 0.1),
        library("build emulated", 0.8, EMULATED, ASPP_EXT_CUDA="emulate"),
        Step("build programs", 0.6, ("tests/programs.py",)),
        suite("cpu", 3.5, "--tier=test", "build programs"),
        suite("emulated", 1.3, "--tier=test", "build emulated", **emulated),
        suite("interpreted", 0.7, "--tier=test", why=triton, **INTERPRET),
    ]


def proof_steps() -> list[Step]:
    """What ``make prove`` has beyond them, in the order in which it runs."""
    triton = None if importlib.util.find_spec("triton") else "there is no Triton"
    nvcc = None if shutil.which("nvcc") else "there is no nvcc"
    gcc = None if shutil.which("g++") else "there is no g++"
    emulated = {"ASPP_EXT_LIBRARY_DIR": EMULATED}
    sanitized, both = (sanitizing(f) if not gcc else {} for f in (SANITIZED, EMULATED_SANITIZED))
    every = {"ASPP_EXT_CUDA_ARCHS": "all", "ASPP_EXT_LIBRARY_DIR": EVERY_ARCHITECTURE}
    return [
        Step("build all programs", 2, ("tests/programs.py", "--all")),
        suite("cpu, the rest", 5, "--tier=prove", "build all programs"),
        suite("emulated, the rest", 2.5, "--tier=prove", "build emulated", **emulated),
        suite("emulated, stored", 0.3, "--setting=stored", "build emulated", **emulated,
            ASPP_EXT_SEPARABLE="stored"),
        suite("interpreted, the rest", 22, "--tier=prove", why=triton, **INTERPRET),
        suite("filtered", 1.3, "--setting=filtered", ASPP_EXT_POLYPHASE="always"),
        suite("not filtered", 1.3, "--setting=unfiltered", ASPP_EXT_POLYPHASE="0"),
        *instruction_sets(),
        *(suite(f"{n} threads", 2, f"--setting=threads --threads={n}") for n in (2, 3)),
        library("build sanitized", 1, SANITIZED, gcc, ASPP_EXT_CUDA="0", CXXFLAGS=SANITIZE),
        suite("sanitized", 1.8, "--setting=sanitized", "build sanitized", gcc, **sanitized),
        library("build sanitized emulated", 2, EMULATED_SANITIZED, gcc, ASPP_EXT_CUDA="emulate",
            CXXFLAGS=SANITIZE),
        suite("sanitized emulated", 7, "--setting=sanitized", "build sanitized emulated", gcc,
            **both),
        library("build every architecture", 3, EVERY_ARCHITECTURE, nvcc, ASPP_EXT_CUDA="1",
            ASPP_EXT_CUDA_ARCHS="all", TORCH_CUDA_ARCH_LIST=""),
        suite("every architecture", 1, "--setting=architectures", "build every architecture", nvcc,
            **every),
    ]  # fmt: skip
