#!/usr/bin/env bash
# On a machine with a GPU, with its own Python and no network: builds where what is there does not load, compares every
# op with the CPU, measures, tests, looks for bad accesses and races, profiles. A step that fails or takes too long costs
# itself alone. All that is written lies in OUT (build/gpu): a log of each step, and gpu.json for bench/report.py.
# LIMIT: seconds, 540. --dry-run, anywhere: the same steps on the CPU with small tensors; its times mean nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} limit=${LIMIT:-540} out=${OUT:-build/gpu} dry=
[ "${1:-}" != --dry-run ] || dry=--dry-run
# cuBLAS asks for the workspace where results must be reproducible, as the tests want them.
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 SK_CUDA_ARCHS=${SK_CUDA_ARCHS:-90-real}
mkdir -p "$out"
failed=0

say() { echo "[$SECONDS s] $*"; }
has() { command -v "$1" >/dev/null || { say "$1: not here, its step is left out"; false; }; }
# At most $1 seconds and what is left of the limit; several steps may share a log.
step() {
  local most=$1 log=$out/$2.log left=$((limit - SECONDS)) status=0; shift 2
  say "${log##*/}: $*"
  timeout -s INT -k 5 "$((left < most ? (left > 1 ? left : 1) : most))" "$@" >>"$log" 2>&1 || status=$?
  tail -n 15 "$log"
  [ "$status" = 0 ] || { say "${log##*/}: FAILED with status $status"; failed=1; }
}
rm -f "$out"/*.log

if has nvidia-smi; then step 15 machine nvidia-smi; fi
if [ -n "$dry" ]; then loads="import surgery_kernels"; else loads="import surgery_kernels as sk; assert sk._C.build_info()['cuda']"; fi
"$python" -c "$loads" 2>/dev/null || SK_CUDA=${SK_CUDA:-1} step 120 build "$python" setup.py --quiet build_ext --inplace
step 40 smoke "$python" bench/gpu_smoke.py $dry
step 200 measure "$python" bench/gpu.py --budget 180 --json "$out/gpu.json" $dry

# Those that need no GPU, or compile for ones that are not there, are left out; the CUDA kernels first.
tests=$(ls tests/cuda/test_gpu.py tests/triton/test_*.py | grep -v -e test_compile.py -e test_interpreter.py)
how=--collect-only
[ -n "$dry" ] || how=$("$python" -c "import xdist" 2>/dev/null && echo "-n 12 --dist worksteal" || true)
# shellcheck disable=SC2086
step 150 tests "$python" -m pytest -q -ra --tb=short --maxfail=30 $how $tests

if has compute-sanitizer; then
  for tool in memcheck racecheck; do
    step 45 sanitizers compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -q tests/cuda/test_gpu.py -k "small and 257"
  done
fi
if has ncu; then
  step 60 profile ncu --clock-control none --set full --launch-count 4 --kernel-name "regex:_count|_gather|_merge" \
    "$python" bench/gpu_smoke.py $dry
fi
limit=$((SECONDS + 20))  # shown in any case
step 20 table "$python" bench/gpu.py --table "$out/gpu.json"
exit "$failed"
