#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Whether the emulation's instructions are the GPU's: compiles tests/emulation/instructions.cu for
# both and compares what they print. Needs nvcc and g++. With --device cpu the emulation, in another
# order of threads and blocks, takes the GPU's place.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
g++ -std=c++20 -O2 -fno-strict-aliasing -pthread -DASPP_EMULATE -Icsrc -Icsrc/cuda/emulation \
  -xc++ tests/emulation/instructions.cu csrc/cuda/emulation/*.cpp -o "$work/emulated"
"$work/emulated" >"$work/emulated.txt"
if [[ $* == '--device cpu' ]]; then
  ASPP_EMULATE_SEED=1 "$work/emulated" >"$work/hardware.txt"
else
  nvcc -std=c++20 -O3 -arch=native -Icsrc tests/emulation/instructions.cu -o "$work/hardware"
  "$work/hardware" >"$work/hardware.txt"
fi
"${PYTHON:-python3}" scripts/compare_instructions.py "$work/hardware.txt" "$work/emulated.txt"
