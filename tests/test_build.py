# SPDX-License-Identifier: BSD-3-Clause
"""The build: architectures and flags, what it refuses, what it puts where, and what it leaves out.

The graph is built for a copy of the repository with small sources of its own, so that the CUDA
half is tested before, and apart from, the real kernels.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from processes import run_python

from aspp_ext import _native
from aspp_ext.__main__ import read_build_info

ROOT = Path(__file__).resolve().parents[1]
CUDA_KERNEL = """
#include <cuda_runtime.h>
__global__ void kernel_NAME(float* p) { p[threadIdx.x] = 1.0f; }
cudaError_t launch_NAME(float* p, cudaStream_t stream) {
  kernel_NAME<<<1, 32, 0, stream>>>(p);
  return cudaGetLastError();
}
"""
CUDA_BINDING = """
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
cudaError_t launch_fill_sm80(float*, cudaStream_t);
void fill(torch::stable::Tensor x) {
  launch_fill_sm80(static_cast<float*>(x.data_ptr()), nullptr);
}
STABLE_TORCH_LIBRARY_IMPL(aspp_ext_build_test, CUDA, m) { m.impl("fill", TORCH_BOX(&fill)); }
"""


@pytest.fixture
def graph(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "csrc"))
    import build_graph

    return build_graph


@pytest.fixture
def repository(tmp_path):
    """A repository with the real build files and one small source for each library."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    sources = {
        "aspp_ext/__init__.py": "",
        "csrc/plan/plan.cpp": "int answer() { return 42; }\n",
        "csrc/plan_bindings.cpp": "int answer();\nint bound() { return answer(); }\n",
        "csrc/library.cpp": "#include <torch/csrc/stable/library.h>\n"
        'STABLE_TORCH_LIBRARY(aspp_ext_build_test, m) { m.def("fill(Tensor x) -> ()"); }\n',
        "csrc/cpu/kernels/kernel.cpp": "namespace ASPP_ISA { int answer() { return 1; } }\n",
    }
    for name, text in sources.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    shutil.copy(ROOT / "csrc/build_graph.py", tmp_path / "csrc")
    return tmp_path


def build(repository, **variables):
    names = ("CXX", "CXXFLAGS", "LDFLAGS", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST")
    env = {k: v for k, v in os.environ.items() if not k.startswith("ASPP_EXT") and k not in names}
    argv = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = env | variables
    ran = subprocess.run(argv, cwd=repository, env=environment, capture_output=True, text=True)
    return ran.returncode, ran.stdout + ran.stderr


def add_cuda(repository):
    kernels = repository / "csrc/cuda/kernels"
    kernels.mkdir(parents=True)
    for name in ("fill_sm80", "fill_sm90"):
        (kernels / f"{name}.cu").write_text(CUDA_KERNEL.replace("NAME", name))
    (repository / "csrc/cuda/fill.cpp").write_text(CUDA_BINDING)


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ("8.0;9.0a", ["8.0", "9.0a"]),
        ("8.0 9.0", ["8.0", "9.0a"]),
        ("9.0+PTX", ["9.0a+PTX"]),
        ("8.6;10.0f;12.0f+PTX;", ["8.6", "10.0f", "12.0f+PTX"]),
    ],
)
def test_architectures(graph, wish, expected):
    assert graph.split_architectures(wish) == expected


@pytest.mark.parametrize("wish", ["7.5", "Hopper", "8.0;native", "90a.0.0"])
def test_unknown_architecture_is_refused(graph, wish):
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST: expected 8\.0 or newer"):
        graph.split_architectures(wish)


def test_gencodes_follow_the_file_name(graph):
    architectures = graph.split_architectures(graph.ARCHITECTURES)
    assert graph.gencodes(Path("pyramid_sm90.cu"), architectures) == [
        "-gencode=arch=compute_90a,code=sm_90a"
    ]
    assert graph.gencodes(Path("pyramid_sm80.cu"), architectures) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_100f,code=sm_100",
        "-gencode=arch=compute_120f,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    assert graph.gencodes(Path("pyramid_sm90.cu"), ["8.0"]) == []


ALL = ["8.0", "9.0a", "10.0f", "12.0f+PTX"]


@pytest.mark.parametrize(
    ("everywhere", "variables", "gpus", "expected"),
    [
        (False, {}, set(), ["8.0+PTX"]),
        (False, {}, {"9"}, ["9.0a"]),
        (False, {}, {"8", "12"}, ["8.0", "12.0f+PTX"]),
        (False, {}, {"11"}, ALL),  # none of them is for this one alone
        (False, {}, {"8", "11"}, ALL),
        (True, {}, set(), ALL),
        (True, {}, {"9"}, ALL),
        (False, {"ASPP_EXT_CUDA_ARCHS": "all"}, set(), ALL),
        (False, {"ASPP_EXT_CUDA_ARCHS": "auto"}, {"9"}, ["9.0a"]),
        (True, {"TORCH_CUDA_ARCH_LIST": "8.6"}, {"9"}, ["8.6"]),
        (False, {"TORCH_CUDA_ARCH_LIST": "8.6", "ASPP_EXT_CUDA_ARCHS": "all"}, set(), ["8.6"]),
    ],
)
def test_architectures_of_a_build(graph, monkeypatch, everywhere, variables, gpus, expected):
    for name in ("TORCH_CUDA_ARCH_LIST", "ASPP_EXT_CUDA_ARCHS"):
        monkeypatch.setenv(name, variables.get(name, ""))
    monkeypatch.setattr(graph, "gpu_generations", lambda: gpus)
    assert graph.choose_architectures(everywhere) == expected


def test_gpus_are_found_by_their_driver(graph, monkeypatch, tmp_path):
    for status, answer, expected in ((0, "9.0\n8.6\n9.0", {"8", "9"}), (9, "no driver", set())):
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\necho '{answer}'; exit {status}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.defpath}")
        assert graph.gpu_generations() == expected


def test_unknown_wish_is_refused(graph, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setenv("ASPP_EXT_CUDA_ARCHS", "9.0")
    with pytest.raises(SystemExit, match=r"must be auto or all but is '9\.0'"):
        graph.choose_architectures(False)


def test_seconds_of_each_stage(graph):
    lines = [
        "0\t2000\t7\tbuild/objects/csrc/cuda/kernels/a.cu.o\tabc",
        "0\t1000\t7\tbuild/objects/isa_avx2/csrc/cpu/kernels/kernels.cpp.o\tabc",
        "1000\t4000\t7\tbuild/objects/isa_baseline/csrc/cpu/kernels/kernels.cpp.o\tabc",
        "4000\t5000\t7\tbuild/objects/libaspp_cpu.so\tabc",
    ]
    expected = "csrc/cpu/kernels 4 s, csrc/cuda/kernels 2 s, linking 1 s"
    assert graph.seconds_by_stage(lines) == expected


def test_small_build_and_its_second_run(repository):
    code, text = build(repository, MAX_JOBS="2")
    assert code == 0, text
    assert "without CUDA: csrc/cuda has no kernels yet" in text
    package = repository / "aspp_ext"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    made = {path.name for path in package.iterdir()}
    assert made == {"__init__.py", "_build_info.json", "libaspp_cpu.so", f"_plan{suffix}"}
    info = json.loads((package / "_build_info.json").read_text())
    assert info["torch"] == torch.__version__
    assert info["cuda"] is None
    assert re.search(r"compiled .*csrc/cpu/kernels \d+ s.*; \d+ s, 2 at a time", text)

    first = {path: path.stat().st_mtime_ns for path in package.iterdir()}
    code, text = build(repository)
    assert code == 0, text
    assert "no work to do" in text
    assert "compiled" not in text
    assert first == {path: path.stat().st_mtime_ns for path in package.iterdir()}


def test_emulated_kernels_take_the_place_of_the_cpu_binding(repository):
    emulated = "#ifndef ASPP_EMULATE\n#error not emulated\n#endif\n#include <cuda_runtime.h>\n"
    sources = {
        "cpu/pyramid.cpp": "#error not left out\n",
        "cpu/separable.cpp": "#error not left out\n",
        "cuda/pyramid.cpp": emulated,
        "cuda/kernels/fill_sm80.cu": emulated + "Emulated kernel;\n",
        "cuda/kernels/fill_sm90.cu": "#error cannot be emulated\n",
        "cuda/emulation/cuda_runtime.h": "struct Emulated {};\n",
    }
    for name, text in sources.items():
        path = repository / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    code, text = build(repository, ASPP_EXT_CUDA="emulate", ASPP_EXT_LIBRARY_DIR="build/emulated")
    assert code == 0, text
    folder = repository / "build/emulated"
    assert {path.name for path in folder.iterdir()} == {"libaspp_cpu.so", "_build_info.json"}
    assert json.loads((folder / "_build_info.json").read_text())["emulated"] is True


def test_failing_compiler_is_an_error_with_its_message(repository):
    (repository / "csrc/library.cpp").write_text("int unused_result() { int x; }\n")
    code, text = build(repository)
    assert code != 0
    assert "unused" in text
    assert "ninja stopped" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"ASPP_EXT_CUDA": "yes"}, "ASPP_EXT_CUDA must be auto, 0, 1 or emulate but is 'yes'"),
        ({"ASPP_EXT_CUDA": "emulate"}, "needs an ASPP_EXT_LIBRARY_DIR of its own"),
        ({"CXX": "no-such-compiler"}, "needs a C++20 compiler"),
        ({"CXX": "g++ 'x"}, 'CXX must be words as a shell takes them, got "g++ \'x"'),
        ({"CXXFLAGS": '-DA="'}, "CXXFLAGS must be words as a shell takes them"),
        ({"LDFLAGS": "'"}, "LDFLAGS must be words as a shell takes them"),
    ],
)
def test_bad_variables_are_refused_in_a_sentence(repository, variables, sentence):
    code, text = build(repository, **variables)
    assert code != 0
    assert sentence in text
    assert "Traceback" not in text


def test_folders_of_any_name(repository):
    """Spaces around the variable are not meant; inside a name they are, and so is any letter."""
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    repository = repository.rename(repository.with_name("Grüße an alle"))
    code, text = build(repository, ASPP_EXT_LIBRARY_DIR="übrige Dateien ", **plain)
    assert code == 0, text
    assert (repository / "übrige Dateien/libaspp_cpu.so").exists()


def test_missing_nvcc(repository):
    add_cuda(repository)
    code, text = build(repository, CUDA_HOME="no/toolkit")
    assert code == 0, text
    assert "without CUDA: no nvcc in no/toolkit" in text
    code, text = build(repository, CUDA_HOME="no/toolkit", ASPP_EXT_CUDA="1")
    assert code != 0
    assert "ASPP_EXT_CUDA=1 needs nvcc and cuda_runtime.h, not found in no/toolkit" in text


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc to build CUDA sources")
def test_cuda_library_also_against_a_cpu_torch(repository):
    add_cuda(repository)
    code, text = build(repository, TORCH_CUDA_ARCH_LIST="8.0;9.0")
    assert code == 0, text
    assert "9.0 is built as 9.0a" in text
    library = repository / "aspp_ext/libaspp_cuda.so"
    read = subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= set(re.findall(r"\[(.*)\]", read))
    info = json.loads((repository / "aspp_ext/_build_info.json").read_text())
    assert info["architectures"] == ["8.0", "9.0a"]

    code, text = build(repository, ASPP_EXT_CUDA="0")
    assert code == 0, text
    assert not library.exists()


def test_installed_build_is_this_source(graph):
    info = read_build_info()
    assert info, "nothing was built: make build"
    assert info["version"] == __import__("aspp_ext").__version__
    x86 = "isa_avx2" in info["isas"]
    assert set(info["isas"]) == (set(graph.X86_ISAS) if x86 else {"isa_baseline"})


@pytest.mark.skipif(
    re.search(r"(^|\s)(-g|--coverage)", os.environ.get("CXXFLAGS", "")) is not None,
    reason="what a debugger or gcov reads has the sources' paths",
)
def test_libraries_hold_no_path_of_this_machine():
    for path in _native.library_dir().glob("*.so"):
        contents = path.read_bytes()
        assert str(ROOT).encode() not in contents, path
        assert os.fsencode(torch.__path__[0]) not in contents, path


def test_environment_variables_are_documented():
    """README's table is the code's: neither has a variable that the other lacks."""
    paths = [ROOT / "setup.py", ROOT / "csrc/build_graph.py"]
    for folder, pattern in (("aspp_ext", "*.py"), ("csrc", "*.cpp"), ("csrc", "*.h")):
        paths += (ROOT / folder).rglob(pattern)
    used = re.findall(r"\bASPP_EXT_[A-Z]\w*", "\n".join(path.read_text() for path in paths))
    table = re.findall(r"^\| `(ASPP_EXT_\w+)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert set(used) == set(table)


def test_report_runs_without_a_gpu():
    ran = run_python("-m", "aspp_ext")
    assert ran.returncode == 0, ran.stderr
    for title in ("Versions", "Build", "Libraries", "Devices", "Implementations on cpu"):
        assert f"\n{title}\n" in "\n" + ran.stdout
    assert "libaspp_cpu.so" in ran.stdout
