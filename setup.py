# SPDX-License-Identifier: BSD-3-Clause
"""Builds the native libraries with ninja; csrc/build_graph.py says what goes into them.

torch is read (headers, libraries, version.py) but never imported: the libraries use its stable ABI,
so a torch that pip's build isolation hides will do. README.md has the environment variables.
"""

import filecmp
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

import build_graph as build  # noqa: E402
from build_graph import read_env, refuse, say  # noqa: E402


def find_torch():
    """Folder and version.py of the first torch >= 2.11, inside or outside pip's isolation."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    for prefix in (sys.prefix, sys.base_prefix):
        paths = sysconfig.get_paths(vars={"base": prefix, "platbase": prefix})
        folders.append(Path(paths["platlib"], "torch"))
    for folder in folders:
        if (folder / "include/torch/csrc/stable/library.h").exists():
            version = runpy.run_path(str(folder / "version.py"))
            if tuple(map(int, version["__version__"].split(".")[:2])) >= (2, 11):
                return folder, version
    return None, None


def find_compiler():
    """The C++ compiler's command and the first line of what it says about itself."""
    found = [path for path in map(shutil.which, ("g++", "clang++")) if path]
    command = build.read_words("CXX") or found[:1]
    if not command or not shutil.which(command[0]):
        refuse("needs a C++20 compiler: install g++ or clang++, or set CXX")
    answer = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    return command, answer.partition("\n")[0]


def install(path, folder):
    """Copies where the bytes differ, by rename: a running process keeps the library it has."""
    target = folder / path.name
    if not target.exists() or not filecmp.cmp(path, target, shallow=False):
        shutil.copy2(path, target.with_name(f".{target.name}.new"))
        os.replace(target.with_name(f".{target.name}.new"), target)


class NinjaBuild(build_ext):
    def run(self):
        torch, version = find_torch()
        if not torch:
            refuse("needs torch >= 2.11: pip install torch, then --no-build-isolation")
        package = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        elsewhere = read_env("ASPP_EXT_LIBRARY_DIR")
        folder = Path(elsewhere).resolve() if elsewhere else package / "aspp_ext"
        work = build.objects_of(folder) if elsewhere else "build/objects"
        cxx, compiler = find_compiler()
        graph, cuda = build.Graph(work, cxx, torch), build.find_cuda()
        architectures = build.choose_architectures(everywhere=package != ROOT) if cuda else []
        if not elsewhere:  # Python finds the planner in the package only
            graph.add_planner()
        facts = {
            "version": self.distribution.get_version(),
            "torch": version["__version__"],
            "compiler": compiler,
            "isas": graph.add_cpu(emulated := build.is_emulated()),
            "emulated": emulated,
            "cuda": None,
            "architectures": architectures,
        }
        if cuda:
            graph.add_cuda(cuda, architectures)
            nvcc = subprocess.run([cuda / "bin/nvcc", "--version"], capture_output=True, text=True)
            facts["cuda"] = nvcc.stdout.partition("release ")[2].partition(",")[0]
            if version["cuda"] and version["cuda"].split(".")[0] != facts["cuda"].split(".")[0]:
                say(f"nvcc is {facts['cuda']} but torch has {version['cuda']}: it will not load")
        for name, fact in facts.items():
            if fact:
                say(f"{name}: {' '.join(fact) if isinstance(fact, list) else fact}")
        facts["sources"] = build.digests_of_sources()

        Path(ROOT, work).mkdir(parents=True, exist_ok=True)
        Path(ROOT, work, "build.ninja").write_bytes(os.fsencode("\n".join(graph) + "\n"))
        jobs = read_env("MAX_JOBS", str(len(os.sched_getaffinity(0))))
        ninja = [build.find_ninja(), "-f", f"{work}/build.ninja", "-j", jobs]
        log, began = Path(ROOT, work, ".ninja_log"), time.perf_counter()
        before = set(build.read_log(log))
        if code := subprocess.run(ninja, cwd=ROOT).returncode:
            refuse(f"ninja stopped with exit status {code}; the reason is printed above")
        if built := [line for line in build.read_log(log) if line not in before]:
            wall = time.perf_counter() - began
            say(f"compiled {build.seconds_by_stage(built)}; {wall:.0f} s, {jobs} at a time")

        folder.mkdir(parents=True, exist_ok=True)
        made = [Path(ROOT, library) for library in graph.libraries]
        made.append(Path(ROOT, work, "_build_info.json"))
        made[-1].write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
        for path in made:
            install(path, folder)
        if not cuda:
            (folder / "libaspp_cuda.so").unlink(missing_ok=True)
        say(f"{len(graph.libraries)} libraries in {os.path.relpath(folder)}")

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


setup(
    cmdclass={"build_ext": NinjaBuild},
    ext_modules=[Extension("aspp_ext._plan", [])],  # marks the wheel as one with compiled parts
    setup_requires=[] if find_torch()[0] else ["torch>=2.11"],  # downloaded only where none is
)
