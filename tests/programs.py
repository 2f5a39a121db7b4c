# SPDX-License-Identifier: BSD-3-Clause
"""The C++ programs that tests run: kernels under ``csrc/cuda/emulation``, and the planner alone.

``python tests/programs.py`` compiles those that ``make test`` runs, with ``--all`` every one. A
test that asks for one gets what is newer than its sources, or waits until it is.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from kernel_faults import FAULTS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc"))

from build_graph import RULES, find_ninja  # noqa: E402

BUILD = "build/programs"
KERNELS = "csrc/cuda/kernels"
# Kernels read memory as other types than it was written as, which nvcc allows.
FLAGS = (
    "-std=c++20 -Wall -Wextra -Werror -Wno-unknown-pragmas -fno-strict-aliasing -pthread"
    " -DASPP_EMULATE -Icsrc -Icsrc/cuda/emulation"
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


class Program(NamedTuple):
    """Patterns of its sources, and the variants that there are of it."""

    sources: tuple[str, ...]
    variants: tuple[str, ...] = tuple(VARIANTS)


EMULATION = "csrc/cuda/emulation/*.cpp"
PLAN = "csrc/plan/*.cpp"
HOST = ("csrc/cuda/plan_cache.cpp", "csrc/cuda/prepare.cpp")
DEPTHWISE = ("combine", "between_grad", "depthwise", "depthwise_grad_input")
DEPTHWISE += ("depthwise_grad_weight", "depthwise_parts")


def emulated(name: str, *sources: str, variants: Iterable[str] = VARIANTS) -> Program:
    return Program((f"tests/emulation/{name}", EMULATION, *sources), tuple(variants))


NOT_THREAD = ("plain", "address")
PROGRAMS = {
    "twins": emulated("twins.cpp", variants=NOT_THREAD),
    "execution": emulated("execution.cpp"),
    "runtime": emulated("runtime.cpp", variants=NOT_THREAD),
    "faults": emulated("faults.cpp"),
    "instructions": emulated("instructions.cu", variants=["plain"]),
    "transpose": emulated("transpose.cpp", f"{KERNELS}/transpose_sm80.cu"),
    "launches": emulated("launches.cpp", PLAN, *HOST, f"{KERNELS}/*.cu"),
    "pyramid_check": emulated("pyramid_check.cpp", PLAN, f"{KERNELS}/*.cu"),
    "separable_check": emulated("separable_check.cpp", PLAN, f"{KERNELS}/separable*.cu"),
    "depthwise_check": emulated(
        "depthwise_check.cpp", *(f"{KERNELS}/{name}_sm80.cu" for name in DEPTHWISE)
    ),
    "plan_exhaustive": Program(("tests/plan_exhaustive.cpp", PLAN), ("plain",)),
    "work_list_check": Program(("tests/work_list_check.cpp", PLAN), ("plain",)),
}


def path_of(name: str, variant: str = "plain", fault: str = "") -> Path:
    return ROOT / BUILD / variant / (f"{name}-{fault}" if fault else name)


def quick() -> list[Path]:
    """What ``make test`` runs."""
    planted = [(name, fault) for name in FAULTS for fault, f in FAULTS[name].items() if f.quick]
    return [*map(path_of, PROGRAMS), *(path_of(name, "plain", fault) for name, fault in planted)]


def plant(name: str, fault: str) -> str | None:
    """A mirror of csrc in which one file has the fault, all others are links to the right ones.

    None where the line to plant it in has changed.
    """
    file, right, wrong, *_ = FAULTS[name][fault]
    text = (ROOT / KERNELS / file).read_text()
    if text.count(right) != 1:
        return None
    mirror = Path(BUILD, "planted", name, fault)
    for folder in (".", "cuda", "cuda/kernels"):
        here = ROOT / mirror / folder
        here.mkdir(parents=True, exist_ok=True)
        for path in (ROOT / "csrc" / folder).iterdir():
            link = here / path.name
            if path.name not in ("cuda", "kernels", file) and not link.is_symlink():
                link.unlink(missing_ok=True)  # which had another fault
                link.symlink_to(os.path.relpath(path, here))
    spoilt, changed = ROOT / mirror / "cuda/kernels" / file, text.replace(right, wrong)
    if spoilt.is_symlink():
        spoilt.unlink()
    if not spoilt.exists() or spoilt.read_text() != changed:
        spoilt.write_text(changed)
    return str(mirror)


class Graph:
    """The lines of a build.ninja; paths are relative to the repository."""

    def __init__(self) -> None:
        self.cxx = shlex.split(os.environ.get("CXX") or "g++")
        self.flags = [*FLAGS.split(), *shlex.split(os.environ.get("CXXFLAGS", ""))]
        self.lines, self.made = [RULES.format(BUILD)], set[str]()

    def add(self, rule: str, output: str, inputs: list[str], argv: list[str]) -> str:
        if output not in self.made:
            self.made.add(output)
            self.lines.append(f"build {output}: {rule} {' '.join(inputs)}")
            self.lines.append(f"  argv = {shlex.join([*argv, '-o', output])}")
        return output

    def compile(self, path: str, variant: str, mirror: str = "") -> str:
        argv = [*self.cxx, *VARIANTS[variant].split(), *([f"-I{mirror}"] if mirror else [])]
        source = path.replace("csrc", mirror, 1) if mirror else path
        output = f"{BUILD}/{variant}/{source.removeprefix(f'{BUILD}/')}.o"
        return self.add("compile", output, [source], [*argv, *self.flags, "-xc++", "-c", source])

    def link(self, output: Path, variant: str, objects: list[str]) -> None:
        argv = [*self.cxx, *VARIANTS[variant].split(), *self.flags, *objects]
        self.add("link", str(output.relative_to(ROOT)), objects, argv)

    def add_program(self, name: str) -> None:
        sources, variants = PROGRAMS[name]
        paths = [str(p.relative_to(ROOT)) for s in sources for p in sorted(ROOT.glob(s))]
        objects = {v: {path: self.compile(path, v) for path in paths} for v in variants}
        for variant in variants:
            self.link(path_of(name, variant), variant, list(objects[variant].values()))
        for fault, planted in FAULTS.get(name, {}).items():
            if mirror := plant(name, fault):
                kernel, variant = f"{KERNELS}/{planted.kernel}", planted.variant
                faulty = objects[variant] | {kernel: self.compile(kernel, variant, mirror)}
                self.link(path_of(name, variant, fault), variant, list(faulty.values()))


def build(targets: Iterable[Path], **options: bool) -> None:
    """Compiles what changed; ``options`` are those of subprocess.run."""
    file = ROOT / BUILD / "build.ninja"
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name("lock"), "w") as lock:  # test processes may ask at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        graph = Graph()
        for name in PROGRAMS:
            graph.add_program(name)
        text = "\n".join(graph.lines) + "\n"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        wanted = [str(path.relative_to(ROOT)) for path in targets]
        wanted = [path for path in wanted if path in graph.made]  # of others `ready` says why
        ninja = [find_ninja(), "--quiet", "-f", str(file.relative_to(ROOT)), "-j", jobs, *wanted]
        ran = subprocess.run(ninja, cwd=ROOT, text=True, **options)
    if ran.returncode != 0:
        raise RuntimeError(f"the programs do not compile\n{ran.stdout or ''}{ran.stderr or ''}")


def ready(name: str, variant: str = "plain", fault: str = "") -> Path:
    """The program, with a fault where one is named, newer than its sources."""
    if fault:
        file, right, *_ = FAULTS[name][fault]
        found = (ROOT / KERNELS / file).read_text().count(right)
        assert found == 1, f"{file} has the line to plant {fault} in {found} times"
    path = path_of(name, variant, fault)
    build([path], capture_output=True)
    return path


def run(program: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | ENVIRONMENT | variables
    argv = [program, *map(str, arguments)]
    return subprocess.run(argv, env=env, capture_output=True, text=True)


if __name__ == "__main__":
    every = [path_of(name, variant) for name, p in PROGRAMS.items() for variant in p.variants]
    every += [path_of(n, f.variant, fault) for n in FAULTS for fault, f in FAULTS[n].items()]
    build(every if "--all" in sys.argv else quick())
