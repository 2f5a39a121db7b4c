#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Which lines the tests reach, of the Python package and of the C++ that runs on a CPU: the planner,
# the CPU's kernels, and CUDA's under emulation; a line counts once, for all instruction sets and
# instances of a template. Options are those of scripts/prove.py, as --test.
# Everything happens in a copy of the sources, build/coverage, with a build of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly TREE=$PWD/build/coverage PYTHON=${PYTHON:-python3}
rm -rf "$TREE" && mkdir -p "$TREE"
git ls-files -z --cached --others --exclude-standard |
  tar --create --null --files-from=- --ignore-failed-read | tar --extract -C "$TREE"
cd "$TREE"
export CXXFLAGS=--coverage ASPP_EXT_CUDA=0 PYTHONPATH=$TREE COVERAGE_FILE=$TREE/.coverage
"$PYTHON" setup.py -q build_ext --inplace
status=0
"$PYTHON" -m coverage run --rcfile=pyproject.toml scripts/prove.py "$@" || status=$?

"$PYTHON" -m coverage combine --quiet
printf '\n%-12s %s\n' "lines" "covered"
printf '%-12s %s %%\n' aspp_ext "$("$PYTHON" -m coverage report --format=total --precision=1)"
"$PYTHON" -m gcovr -r . --gcov-ignore-parse-errors=all --exclude-directories '.*/planted' \
  --json cxx.json csrc build 2>gcovr.log || { tail gcovr.log && exit 1; }
for folder in csrc/plan csrc/cpu csrc/cuda; do
  share=$("$PYTHON" -m gcovr -r . -a cxx.json --merge-lines --filter "$folder/" \
    --exclude '.*/emulation/' 2>>gcovr.log |
    awk '$1 == "TOTAL" { print $3 " of " $2 ", " $4 }')
  printf '%-12s %s\n' "$folder" "$share"
done
exit "$status"
