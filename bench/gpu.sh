#!/usr/bin/env bash
# On a machine with a GPU: builds in place with its own Python (no network), tests, looks for bad accesses and races,
# measures, and prints a short table last; build/gpu.json is the run, for bench/report.py. LIMIT: seconds, 540.
# --dry-run, anywhere: builds beside the checkout, collects the tests, compiles ahead of time, measures nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} limit=${LIMIT:-540} out=${OUT:-build}
# cuBLAS asks for the workspace where results must be reproducible, as the tests want them.
export PYTHONPATH=$PWD CUBLAS_WORKSPACE_CONFIG=:4096:8 SK_CUDA_ARCHS=${SK_CUDA_ARCHS:-90-real}
mkdir -p "$out"

say() { echo "[$SECONDS s] $*"; }
# What is left of the limit, at most $1 seconds; a step that fails is told and the next one still runs.
step() {
  local most=$1 name=$2 left=$((limit - SECONDS)); shift 2
  say "$name"
  timeout "$((left < most ? (left > 1 ? left : 1) : most))" "$@" >"$out/$name.log" 2>&1 || {
    say "$name: FAILED with status $?, the end of $out/$name.log:"
    tail -n 20 "$out/$name.log"
    failed=1
  }
}
failed=0
gpu_tests=$(ls tests/triton/test_*.py tests/cuda/test_gpu.py 2>/dev/null || true)

if [ "${1:-}" = --dry-run ]; then
  limit=3600
  if command -v nvcc >/dev/null; then
    SK_CUDA=1 step 1800 build "$python" setup.py --quiet build_ext --build-lib build/gpu --build-temp build/gpu
    step 1200 compile_cuda "$python" bench/compile_cuda.py --architectures 90
  else
    say "build: left out, there is no nvcc"
  fi
  [ ! -f bench/compile_kernels.py ] || step 1200 compile_triton "$python" bench/compile_kernels.py --targets sm_90
  # shellcheck disable=SC2086
  step 300 collect "$python" -m pytest -q --collect-only $gpu_tests
  step 300 measure "$python" bench/gpu.py --dry-run --json "$out/gpu.json"
  step 60 report "$python" bench/report.py "$out/gpu.json"
  exit "$failed"
fi

SK_CUDA=1 step 240 build "$python" setup.py --quiet build_ext --inplace
# shellcheck disable=SC2086
step 150 tests "$python" -m pytest -q -x $gpu_tests
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step 60 "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -q tests/cuda/test_gpu.py -k "small and 257"
  done
else
  say "memcheck, racecheck: left out, there is no compute-sanitizer"
fi
tail -n 3 "$out/tests.log"
left=$((limit - SECONDS - 15))
timeout "$((left + 15))" "$python" bench/gpu.py --budget "$left" --json "$out/gpu.json"
exit "$failed"
