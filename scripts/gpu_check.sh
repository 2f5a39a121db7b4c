#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# On a machine with a GPU: says what the machine is, builds where no CUDA library loads, and finds
# out by `python -m aspp_ext verify` which kernels are right and fast there.
#
#   scripts/gpu_check.sh [--instructions] [OPTION...] [OUT]
#
#   --instructions  also runs scripts/check_instructions.sh, before
#   OPTION          of verify: --device, --budget (by default 300 seconds), --only, --quick, --again
#   OUT             a folder, by default build/gpu_check: gpu_check.log; verify.json, the table;
#                   entry.json, to be committed; failures.txt, a page about each; verified/, from
#                   which the next run with the same OUT goes on
#
# The exit status is verify's, or 1 where the build failed or an instruction differs. PYTHON names
# the Python, whose torch has CUDA. A build needs nvcc and g++; nothing needs a network.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
device=cuda out=build/gpu_check instructions=0 options=()
while (($#)); do
  case $1 in
    --instructions) instructions=1 ;;
    --quick | --again) options+=("$1") ;;
    --device) device=${2:-} && shift ;;
    --budget | --only) options+=("$1" "${2:-}") && shift ;;
    -*) sed -n '3,16s/^# \{0,1\}//p' scripts/gpu_check.sh >&2 && exit 2 ;;
    *) out=$1 ;;
  esac
  shift
done
mkdir -p "$out" && OUT=$(cd "$out" && pwd) || exit 2
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1 LC_ALL=C.UTF-8 ASPP_EXT_VERIFIED=$OUT/verified

describe() {
  "$PYTHON" -c 'import platform as p, torch; print(p.platform(), "Python", p.python_version(),
    "torch", torch.__version__, "CUDA", torch.version.cuda)' || return
  [[ $device == cpu ]] || nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || :
  [[ $device == cpu ]] || nvcc --version | tail -n 2 || :
}

# A library that loads but was built from other sources would be taken for these.
is_built() {
  "$PYTHON" -c 'import sys; sys.path.insert(0, "csrc")
import build_graph
from aspp_ext import _native, _plan
if _native.read_build_info().get("sources") != build_graph.digests_of_sources():
    sys.exit("the libraries were built from other sources")
sys.exit(_native.cuda_missing)'
}

main() {
  local status=0 code pages
  describe || return 2
  if [[ $device != cpu ]] && ! is_built; then
    "$PYTHON" scripts/build_for_gpu.py && is_built || status=1
  fi
  ((!instructions)) || scripts/check_instructions.sh --device "$device" || status=1
  "$PYTHON" -m aspp_ext verify --device "$device" --budget 300 "${options[@]}" \
    --json "$OUT/verify.json" --export "$OUT/entry.json"
  code=$?
  pages=("$ASPP_EXT_VERIFIED"/failures/*/*.txt)
  # One file, to be carried or mailed.
  if [[ -e ${pages[0]} ]] && cat "${pages[@]}" >>"$OUT/failures.txt"; then
    rm -r "$ASPP_EXT_VERIFIED/failures" && printf 'their pages are in %s\n' "$OUT/failures.txt"
  fi
  return $((code ? code : status))
}

main 2>&1 | tee "$OUT/gpu_check.log"
exit "${PIPESTATUS[0]}"
