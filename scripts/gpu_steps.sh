#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# One step of scripts/gpu_check.sh, which sets DEVICE (cuda, or cpu for a dry run), LIMIT (seconds),
# OUT, WORK and PYTHON. A step's last line is what the summary shows of it.
set -uo pipefail

say() { printf '%s\n' "$*"; }

on_gpu() { [[ $DEVICE == cuda ]]; }

has_module() { "$PYTHON" -c "import importlib.util as u, sys; sys.exit(not u.find_spec('$1'))"; }

# Whether a library of aspp_ext loads; says why not.
loads() { "$PYTHON" -c "import sys; from aspp_ext import _native; sys.exit(_native.$1_missing)"; }

# As in 9.0.
capability() { "$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())'; }

environment() {
  local name missing=
  say "$(uname -srm), $(nproc) processors, $("$PYTHON" --version 2>&1) at $(command -v "$PYTHON")"
  for name in nvcc g++ ninja nm compute-sanitizer ncu nvidia-smi; do
    command -v "$name" >/dev/null || missing+=" $name"
  done
  for name in torch triton pybind11 ninja setuptools pytest pytest_timeout xdist hypothesis \
    torchvision segmentation_models_pytorch rich matplotlib; do
    has_module "$name" || missing+=" python:$name"
  done
  command -v nvcc >/dev/null && nvcc --version | tail -n 2
  command -v nvidia-smi >/dev/null && nvidia-smi
  say "missing:${missing:- nothing}"
  "$PYTHON" - "$DEVICE" <<'PYTHON'
import pathlib, sys, sysconfig, torch

cudnn = torch.backends.cudnn.version()
print("torch", torch.__version__, "CUDA", torch.version.cuda, "cuDNN", cudnn)
header = pathlib.Path(sysconfig.get_path("include"), "Python.h")
print("Python.h:", "there" if header.exists() else "missing, the planner cannot be built")
if sys.argv[1] == "cuda":
    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no CUDA device")
    print(torch.cuda.get_device_properties(0))
PYTHON
}

build() {
  if ! on_gpu; then
    say "dry run: no build, the libraries that are there have to load"
    loads cpu || return 1
    say "libaspp_cpu.so loads"
    return
  fi
  local architecture
  architecture=$(capability) || return 1
  if ! has_module pybind11; then
    say "no pybind11 module: the headers inside torch take its place"
    mkdir -p "$WORK/shim"
    cat >"$WORK/shim/pybind11.py" <<'PYTHON'
import importlib.util
import pathlib


def get_include():
    return str(pathlib.Path(importlib.util.find_spec("torch").origin).parent / "include")
PYTHON
    export PYTHONPATH=$WORK/shim
  fi
  # A setuptools older than 77 refuses pyproject.toml's licence, of which a build needs nothing.
  cat >"$WORK/build.py" <<'PYTHON'
import runpy
import sys

import setuptools

if int(setuptools.__version__.partition(".")[0]) < 77:
    setuptools.Distribution.parse_config_files = lambda *_, **__: None
sys.argv = ["setup.py", "-q", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
PYTHON
  ASPP_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST=$architecture MAX_JOBS=${MAX_JOBS:-$(nproc)} \
    "$PYTHON" "$WORK/build.py" || return 1
  "$PYTHON" -m aspp_ext && loads cuda || return 1
  say "built for $architecture in $SECONDS s"
}

instructions() {
  local twin number
  g++ -std=c++20 -O2 -fno-strict-aliasing -pthread -DASPP_EMULATE -Icsrc -Icsrc/cuda/emulation \
    -xc++ tests/emulation/instructions.cu csrc/cuda/emulation/*.cpp -o "$WORK/emulated" &
  twin=$!
  if on_gpu; then
    number=$(capability) || return 1
    number=${number/./}
    nvcc -std=c++20 -O3 -Icsrc "-gencode=arch=compute_$number,code=sm_$number" \
      tests/emulation/instructions.cu -o "$WORK/hardware" || return 1
  fi
  wait "$twin" && "$WORK/emulated" >"$WORK/emulated.txt" || return 1
  if on_gpu; then
    "$WORK/hardware" >"$WORK/hardware.txt" || return 1
  else
    say "dry run: the emulation takes the GPU's place, in another order of threads and blocks"
    ASPP_EMULATE_SEED=1 "$WORK/emulated" >"$WORK/hardware.txt" || return 1
  fi
  "$PYTHON" scripts/compare_instructions.py "$WORK/hardware.txt" "$WORK/emulated.txt"
}

# The tests for a GPU whose markers an expression selects, by so many processes.
run_tests() {
  local selected=$1 processes=$2 status files
  local options=(-m "gpu and $selected" -p no:cacheprovider --color=no)
  options+=(--continue-on-collection-errors)
  # Where there is no plugin for it, the time limit in pyproject.toml is an unknown option.
  has_module pytest_timeout || options+=(-o addopts=)
  # Other files may import what is not installed here.
  mapfile -t files < <(grep -l 'mark\.gpu' tests/test_*.py)
  if ! on_gpu; then
    say "dry run: the tests are collected"
    "$PYTHON" -m pytest "${options[@]}" --collect-only -q "${files[@]}"
    return
  fi
  has_module xdist && options+=(-n "$processes")
  "$PYTHON" -m pytest "${options[@]}" -q --durations=8 "${files[@]}" | tee "$WORK/tests.txt"
  status=${PIPESTATUS[0]}
  # Tests that were all skipped prove nothing.
  tail -n 1 "$WORK/tests.txt" | grep -q '[1-9][0-9]* passed' && return "$status"
  return 1
}

tests() { run_tests 'not triton' 6; }
# Most of its time goes into compiling, on as many processors.
triton() { run_tests triton "$(($(nproc) > 12 ? 12 : $(nproc)))"; }

sanitize() {
  local implementation=$1 tool=$2 status
  shift 2
  if ! on_gpu; then
    say "dry run: without $tool, a few calls on the CPU"
    [[ $implementation != triton ]] || export TRITON_INTERPRET=1
    "$PYTHON" -m scripts.exercise_kernels --device cpu --quick --implementation "$implementation"
    return
  fi
  # Every tensor in an allocation of its own, so that the tool knows where it ends.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" "$@" --error-exitcode 9 \
    --print-limit 20 --report-api-errors no --target-processes all \
    "$PYTHON" -m scripts.exercise_kernels --implementation "$implementation" 2>&1 |
    tee "$WORK/$tool.txt"
  status=${PIPESTATUS[0]}
  # Without a summary the tool did not see the end.
  grep -E '(ERROR|RACECHECK) SUMMARY' "$WORK/$tool.txt" | tail -n 1 | grep . || return 1
  return "$status"
}

memcheck() { sanitize cuda memcheck --padding 32; }
racecheck() { sanitize cuda racecheck; }
synccheck() { sanitize cuda synccheck; }
initcheck() { sanitize cuda initcheck; }

# Addresses and what is read of memory are our kernels' doing. Shared memory and barriers are
# Triton's, and its programs share nothing else: what other tools say would be about its compiler.
triton_memcheck() { sanitize triton memcheck --padding 32; }
triton_initcheck() {
  on_gpu || { say "dry run: the calls are triton_memcheck's" && return; }
  sanitize triton initcheck
}

benchmark() {
  local options=(--limit "$((LIMIT - 25))" --compile-limit 50)
  on_gpu || options=(--only 'operator: separable 32->32 4x4 1/2/3, bfloat16' --budget 0.02)
  "$PYTHON" -m benchmarks.gpu.run --device "$DEVICE" --out "$OUT" "${options[@]}"
}

kernels() {
  local name
  for name in cuda triton; do
    on_gpu && "$PYTHON" -m scripts.exercise_kernels --names --implementation "$name"
  done
  "$PYTHON" -m benchmarks.gpu.kernels --device "$DEVICE" --out "$OUT" --limit "$((LIMIT / 2))"
}

cudnn() {
  local options=(--limit "$((LIMIT - 30))")
  # A limit that a dry run could reach would leave out what its pictures are made of.
  on_gpu || options=(--limit 3600 --budget 0.01)
  "$PYTHON" -m benchmarks.cudnn_baselines --device "$DEVICE" --out "$OUT" "${options[@]}"
}

"$1"
