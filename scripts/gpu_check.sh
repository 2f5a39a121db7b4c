#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# All that has to be seen on a GPU, under nine minutes: builds for the device that is there, proves
# the kernels, then measures. Needs a torch with CUDA, nvcc and g++; no network.
#
#   scripts/gpu_check.sh [--quick] [--dry-run] [--only STEP,STEP...] [--limit SECONDS] [OUT]
#
#   --quick    the proofs alone, which may take as long
#   --dry-run  the same steps without a GPU: on the CPU, with tiny problems
#   --only     these steps alone, with the build of an earlier run
#   --limit    seconds for all of it
#   OUT        folder for the log, the CSV files and the plots; by default build/gpu_check
#
# Each step has a time limit of its own, and one that fails does not keep the next from running. The
# exit status is 1 when a proof failed or did not run, or a measurement refused a wrong result.
# PYTHON names the Python; ASPP_EXT_COMMIT the commit, where the sources lie without their history.
# What Triton compiles is kept from step to step and gone with the run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

# Proofs decide the exit status, measurements do not. In the order in which they run. Which
# implementation needs which proofs: aspp_ext/verified.py.
readonly PROOFS=(
  environment build instructions tests memcheck racecheck synccheck initcheck
  triton triton_memcheck triton_initcheck
)
readonly MEASUREMENTS=(benchmark kernels cudnn)
declare -rA MOST_SECONDS=(
  [environment]=40 [build]=180 [instructions]=60 [tests]=240 [memcheck]=100 [racecheck]=100
  [synccheck]=70 [initcheck]=70 [triton]=150 [triton_memcheck]=70 [triton_initcheck]=70
  [benchmark]=190 [kernels]=80 [cudnn]=90
)
readonly WRONG=3 # a measurement's exit status when it refused a result

say() { printf '%s\n' "$*"; }

refuse() {
  say "gpu_check: $*" >&2
  exit 2
}

steps=("${PROOFS[@]}" "${MEASUREMENTS[@]}")
limit=530 only='' kind=cuda out=build/gpu_check
while (($#)); do
  case $1 in
    --quick) steps=("${PROOFS[@]}") ;;
    --dry-run) kind=cpu ;;
    --only | --limit)
      (($# > 1)) || refuse "$1 needs a value"
      [[ $1 == --only ]] && only=,$2, || limit=$2
      shift
      ;;
    -h | --help)
      sed -n '3,19s/^# \{0,1\}//p' scripts/gpu_check.sh
      exit
      ;;
    -*) refuse "unknown option $1; --help lists them" ;;
    *) out=$1 ;;
  esac
  shift
done
[[ $limit =~ ^[0-9]+$ ]] || refuse "--limit must be seconds but is $limit"
for name in ${only//,/ }; do
  [[ -n ${MOST_SECONDS[$name]:-} ]] || refuse "there is no step $name, only ${!MOST_SECONDS[*]}"
done
mkdir -p "$out" || exit 2
OUT=$(cd "$out" && pwd) WORK=$(mktemp -d) DEVICE=$kind PYTHON=${PYTHON:-python3}
trap 'rm -rf "$WORK"' EXIT
export OUT WORK DEVICE PYTHON PYTHONUNBUFFERED=1 KINETO_LOG_LEVEL=6 MPLCONFIGDIR=$WORK/matplotlib
export LC_ALL=C.UTF-8 TRITON_CACHE_DIR=$WORK/triton TORCHINDUCTOR_CACHE_DIR=$WORK/inductor
unset ASPP_EXT_BACKEND ASPP_EXT_TRITON_TUNE TRITON_INTERPRET
command -v "$PYTHON" >/dev/null || refuse "there is no $PYTHON; set PYTHON"
readonly LOG=$OUT/gpu_check.log TABLE=$WORK/steps.tsv
: >"$LOG" && : >"$TABLE" || exit 2
failed=0

# At most so many characters of each line.
cut_lines() {
  local line
  while IFS= read -r line; do say "${line:0:$1}"; done
}

is_proof() { [[ " ${PROOFS[*]} " == *" $1 "* ]]; }

# name, result, seconds, detail
record() {
  printf '%s\t%s\t%s\t%s\n' "$@" >>"$TABLE"
  [[ $2 == passed ]] || ! is_proof "$1" || failed=1
}

run() {
  local name=$1 most=${MOST_SECONDS[$1]} left=$((limit - SECONDS)) began=$SECONDS status detail
  local result=passed
  ((most < left)) || most=$left
  if ((most < 5)); then
    record "$name" "not run" 0 "no time was left for it"
    return
  fi
  say "== $name, at most $most s"
  # No pipe: a child that outlives the step must not hold it open.
  LIMIT=$most timeout --kill-after=5 "$most" bash scripts/gpu_steps.sh "$name" \
    >"$WORK/$name.log" 2>&1 </dev/null
  status=$?
  {
    say "== $name"
    head -c 400000 "$WORK/$name.log"
  } >>"$LOG"
  tail -n 25 "$WORK/$name.log" | cut_lines 160
  detail=$(grep -v '^[[:space:]]*$' "$WORK/$name.log" | tail -n 1 | tr '\t' ' ' | cut_lines 120)
  ((status == 0)) || result=failed
  ((status != 124 && status != 137)) || detail="stopped after $most s; $detail"
  ((status != WRONG)) || failed=1
  record "$name" "$result" "$((SECONDS - began))" "$detail"
}

usable=1
for name in "${steps[@]}"; do
  if [[ -n $only && $only != *,$name,* ]]; then
    continue
  elif ((usable)); then
    run "$name"
    [[ $name == environment ]] && usable=$((!failed))
  else
    record "$name" "not run" 0 "the environment does not allow it"
  fi
done

# A file that names every proof, so that a part of them is never taken for all.
timeout --kill-after=5 60 "$PYTHON" -m scripts.record_correctness "$TABLE" "$OUT" \
  --device "$DEVICE" >"$WORK/record.log" 2>&1 || failed=1
{
  printf '\n'
  cat "$WORK/record.log"
  printf '\n%-16s %-8s %7s  %s\n' step result seconds detail
  while IFS=$'\t' read -r name result seconds detail; do
    printf '%-16s %-8s %7s  %s\n' "$name" "$result" "$seconds" "$detail"
  done <"$TABLE"
  ((failed)) && say "FAILED, $SECONDS s" || say "every proof that ran passed, $SECONDS s"
} | tee -a "$LOG"
exit "$failed"
