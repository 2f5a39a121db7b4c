# SPDX-License-Identifier: BSD-3-Clause
"""Builds programs that run CUDA kernels under ``csrc/cuda/emulation``, plain or sanitized."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = "build/emulation"
# Kernels read memory as other types than it was written as, which nvcc allows.
FLAGS = (
    "-std=c++20 -Wall -Wextra -Werror -Wno-unknown-pragmas -fno-strict-aliasing -DASPP_EMULATE"
    " -Icsrc -Icsrc/cuda/emulation"
)
SANITIZED = "-O1 -g1 -fno-omit-frame-pointer -fno-sanitize-recover=all -fsanitize="
VARIANTS = {
    "plain": "-O2",
    "address": SANITIZED + "address,undefined",
    "thread": SANITIZED + "thread",
}
ENVIRONMENT = {
    # No second of waiting after a race; leaks are looked for where a test asks.
    "TSAN_OPTIONS": "atexit_sleep_ms=0",
    "ASAN_OPTIONS": "detect_leaks=0",
}
RULES = """builddir = {0}
rule run
  command = $argv -MD -MF $out.d
  depfile = $out.d
  deps = gcc
rule link
  command = $argv
"""


def find_ninja() -> str:
    try:
        from ninja import BIN_DIR as folder
    except ImportError:
        folder = ""
    path = os.pathsep.join([folder, os.environ.get("PATH", "")])
    found = shutil.which("ninja", path=path)
    assert found, "needs ninja: pip install ninja"
    return found


def paths_of(name: str, *sources: str) -> list[str]:
    patterns = [f"tests/emulation/{name}.cpp", "csrc/cuda/emulation/*.cpp", *sources]
    return [str(p.relative_to(ROOT)) for pattern in patterns for p in sorted(ROOT.glob(pattern))]


def objects(name: str, variant: str, *sources: str) -> list[Path]:
    """What :func:`build` compiled for one variant."""
    return [ROOT / BUILD / variant / f"{path}.o" for path in paths_of(name, *sources)]


def flags(variant: str, csrc: Path) -> list[str]:
    """The compiler and its arguments for sources in another copy of csrc."""
    cxx = shlex.split(os.environ.get("CXX") or "g++")
    return [*cxx, *VARIANTS[variant].split(), *FLAGS.replace("csrc", str(csrc)).split()]


def build(name: str, variants: list[str], *sources: str) -> dict[str, Path]:
    """Each variant's program of ``tests/emulation/<name>.cpp`` and the sources, which are patterns.

    Only what changed is compiled; the emulation itself is always a part.
    """
    cxx = shlex.split(os.environ.get("CXX") or "g++")
    paths = paths_of(name, *sources)
    graph = [RULES.format(BUILD)]
    programs = {}
    for variant in variants:
        argv, objects = [*cxx, *VARIANTS[variant].split()], []
        for path in paths:
            objects.append(f"{BUILD}/{variant}/{path}.o")
            command = [*argv, *FLAGS.split(), "-x", "c++", "-c", path, "-o", objects[-1]]
            graph.append(f"build {objects[-1]}: run {path}\n  argv = {shlex.join(command)}")
        program = f"{BUILD}/{variant}/{name}"
        command = [*argv, *objects, "-o", program]
        graph.append(f"build {program}: link {' '.join(objects)}\n  argv = {shlex.join(command)}")
        programs[variant] = ROOT / program
    file = ROOT / BUILD / f"{name}.ninja"
    file.parent.mkdir(parents=True, exist_ok=True)
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    ninja = [find_ninja(), "-f", str(file.relative_to(ROOT)), "-j", jobs]
    with open(file.parent / "lock", "w") as lock:  # programs share objects, test processes do not
        fcntl.flock(lock, fcntl.LOCK_EX)
        file.write_text("\n".join(graph) + "\n")
        ran = subprocess.run(ninja, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return programs


def run(program: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | ENVIRONMENT | variables
    return subprocess.run(
        [program, *arguments], env=env, capture_output=True, text=True, timeout=300
    )
