#!/usr/bin/env bash
# Everything that needs a GPU, in one go, without network and without installing anything: facts,
# build, tests, compute-sanitizer, benchmarks in order of importance, ncu.
#
#   benchmarks/hardware.sh [minutes=9]
#
# Results go to $OUT if it is set, else to benchmarks/results/<gpu>: summary.txt, tests.txt,
# sanitizer.txt, results.json, results.csv, table.txt, latency.png, stages.png, ncu.txt. A step that
# fails or runs out of its time is noted in summary.txt, and the next one starts. Uses the python3 on
# PATH (PYTHON=... names another). Clocks and other settings of the GPU are left as they are.
set -u
cd "$(dirname "$0")/.." || exit 1
minutes=${1:-9}
if ! [[ $minutes =~ ^[1-9][0-9]*$ ]]; then
  echo "minutes must be a positive whole number, got $minutes" >&2
  exit 2
fi
budget=$((60 * minutes))
export PYTHON=${PYTHON:-python3} PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

gpu=$(timeout 60 "$PYTHON" -c '
from benchmarks.environment import environment, slug
print(slug(environment()))') || gpu=unknown
out=${OUT:-benchmarks/results/$gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)
summary=$out/summary.txt
log=$(mktemp)
trap 'rm -f "$log"' EXIT
rm -f "$out"/{summary,tests,sanitizer,ncu}.txt

note() { printf '%s\n' "$*" | tee -a "$summary"; }
left() { echo $((budget - SECONDS)); }
on_gpu() { [[ $gpu != cpu && $gpu != unknown ]]; }

# step NAME SECONDS FILE COMMAND...: run the command for at most SECONDS, and never past the budget.
# The end of its output goes to FILE, its outcome to the summary.
step() {
  local name=$1 limit=$2 file=$3 code began=$SECONDS
  shift 3
  ((limit <= $(left))) || limit=$(left)
  if ((limit < 8)); then
    note "$name: not run, the time is used up"
    return
  fi
  # An interrupt lets pytest print what it has; a process that ignores it is killed.
  timeout --signal=INT --kill-after=5 "$((limit - 5))" "$@" >"$log" 2>&1 </dev/null
  code=$?
  {
    printf '\n== %s (exit %d)\n' "$name" "$code"
    tail -c 30000 "$log"
  } >>"$file"
  case $code in
    0) note "$name: ok, $((SECONDS - began)) s" ;;
    124 | 137) note "$name: stopped after $((SECONDS - began)) s" ;;
    *) note "$name: FAILED with $code, $((SECONDS - began)) s: $(tail -n 1 "$log" | cut -c1-160)" ;;
  esac
}

if command -v nvcc >/dev/null || [[ -n ${CUDA_HOME:-} || -x /usr/local/cuda/bin/nvcc ]]; then
  step build 180 "$summary" env KEYE_CUDA=1 "$PYTHON" setup.py build_ext --inplace
else
  note "build: not run, there is no nvcc"
fi

facts() {
  date -u +%FT%TZ
  "$PYTHON" -c '
from benchmarks.environment import environment
from keye_kernels import backends, describe_extension
extension = {"csrc": describe_extension()}
for name, value in (environment() | extension | backends()).items():
    print(f"{name}: {value}")'
  command -v nvidia-smi >/dev/null && nvidia-smi --format=csv \
    --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit
  command -v nvcc >/dev/null && nvcc --version | tail -n 2
  local build='setuptools|ninja|pybind11'
  "$PYTHON" -m pip list 2>/dev/null |
    grep -iE "^(torch|triton|transformers|numpy|pytest|pytest-xdist|liger|flash|quack|nvtx|av|$build) "
  return 0
}
export -f facts
step facts 60 "$summary" bash -c facts
on_gpu || note "no GPU: tests and benchmarks run on a CPU, sanitizer and ncu do not run"

# pyproject.toml has options of plugins that may not be here.
pytest=("$PYTHON" -m pytest -o addopts= -p no:cacheprovider -q --tb=short)
# Not what needs a compiler and no GPU. Side by side where that is possible: it is faster, and a
# fault, which ends the CUDA context of its process, costs one test and not all that follow.
options=(-rfE --maxfail=40 --ignore=tests/native --ignore=tests/benchmarks/compile_report)
"$PYTHON" -c 'import xdist' 2>/dev/null && options+=(-n 8)
tests=(tests)
"$PYTHON" -c 'import av' 2>/dev/null || {
  note "PyAV cannot be imported: tests that read videos are skipped"
  PYTHONPATH+=":$PWD/benchmarks/stand_ins"
}
reason=$("$PYTHON" -c 'from keye_model import *' 2>&1 | tail -n 1)
if [[ -n $reason ]]; then
  note "keye_model cannot be imported, its tests are not run: $reason"
  tests=(tests/kernels)
fi
step tests $((budget / 4)) "$out/tests.txt" "${pytest[@]}" "${options[@]}" "${tests[@]}"

# Small shapes: under these tools a kernel is ten to a hundred times slower.
if on_gpu && command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck initcheck; do
    # Memory from a cache would hide accesses past the end of a tensor.
    step "sanitizer, $tool" $((budget / 15)) "$out/sanitizer.txt" \
      env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
      --error-exitcode 9 --print-limit 20 "$PYTHON" -m benchmarks.smallest
  done
elif on_gpu; then
  note "sanitizer: not run, compute-sanitizer is not there"
fi

# Each family in a process of its own: a fault ends the CUDA context of its process only.
ops=(varlen_attention rope paged_prefill_attention paged_decode_attention linear norm
  patch_embed activation merge_patches sampling)
for family in "${ops[@]:0:5}" generate "${ops[@]:5}"; do
  room=$(($(left) - budget / 10)) # the rest is for ncu
  ((room <= budget / 5)) || room=$((budget / 5))
  step "benchmark, $family" "$room" "$out/tests.txt" \
    "${pytest[@]}" "benchmarks/bench_$family.py" --results "$out" --seconds 0.25
done

if on_gpu && command -v ncu >/dev/null; then
  files=("${ops[@]/#/benchmarks/bench_}")
  files=("${files[@]/%/.py}")
  metrics=gpu__time_duration.sum,dram__bytes.sum
  metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,sm__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active
  metrics+=,launch__registers_per_thread,launch__waves_per_multiprocessor
  ours='_[a-z0-9_]+|linear|paged_decode_attention|qk_norm_mrope_store' # Triton's, csrc's
  step ncu "$(left)" "$out/ncu.txt" ncu --clock-control none --csv --page raw \
    --metrics "$metrics" --kernel-name "regex:^($ours)_kernel" --launch-count 60 \
    "${pytest[@]}" "${files[@]}" --nvtx --provider '(triton)' --provider '(cuda)' -k '1k or 4k or 5k'
elif on_gpu; then
  note "ncu: not run, it is not there"
fi
note "total: $SECONDS s of $budget s, results in $out"
