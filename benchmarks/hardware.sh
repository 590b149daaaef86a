#!/usr/bin/env bash
# Everything that needs a GPU, without network and without installing anything: facts, build, tune,
# the whole model against transformers, tests, ncu, compute-sanitizer.
#
#   benchmarks/hardware.sh [minutes=5.5]
#
# It stops when its minutes are over; the next call goes on where it stopped, until every step has
# ended. Two calls of 5.5 minutes are meant to be enough. A step that fails or runs out of its time
# is noted in summary.txt, and the next one starts.
#
# All it writes is in build/hardware: verdicts/, which hold as long as the kernels do not change,
# and a folder of this GPU and these sources with summary.txt, a log per step, results.json,
# results.csv, table.txt and plots. If $OUT is set, it gets summary.txt and all that as
# hardware.tar.gz after each step. To go on in another copy of the sources, unpack the archive in
# its root first.
#
# Uses the python3 on PATH (PYTHON=... names another). The GPU's settings are left as they are.
set -u
cd "$(dirname "$0")/.." || exit 1
minutes=${1:-5.5}
budget=0
[[ $minutes =~ ^[0-9]+(\.[0-9]+)?$ ]] && budget=$(awk "BEGIN { print int(60 * $minutes) }")
if ((budget == 0)); then
  echo "minutes must be a positive number, got $minutes" >&2
  exit 2
fi
export PYTHON=${PYTHON:-python3} PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

left() { echo $((budget - SECONDS)); }

# ask ARGUMENTS...: run Python for an answer, in what is left of the time.
ask() {
  local room
  room=$(left)
  ((room > 0)) && timeout "$((room < 60 ? room : 60))" "$PYTHON" "$@"
}

if key=$(ask -c '
from benchmarks.environment import environment, slug
facts = environment()
print(slug(facts), facts["sources"], sep="-")' 2>&1); then
  reason="" key=${key##*$'\n'}
else
  reason=${key##*$'\n'} key=unknown
fi
folder=build/hardware/$key
out=$PWD/$folder
summary=$out/summary.txt ended=$out/ended.txt # names of the steps that need not run again
export KEYE_KERNELS_CACHE=$PWD/build/hardware/verdicts
mkdir -p "$out" "$KEYE_KERNELS_CACHE"
touch "$summary" "$ended"
later=()

note() { printf '%s\n' "$*" | tee -a "$summary"; }
on_gpu() { [[ $key != cpu-* && $key != unknown ]]; }
has_ended() { grep -Fxq -- "$1" "$ended"; }

save() {
  [[ -n ${OUT:-} ]] || return 0
  mkdir -p "$OUT"
  cp "$summary" "$OUT/summary.txt"
  tar -czf "$OUT/hardware.part" build/hardware/verdicts "$folder" &&
    mv "$OUT/hardware.part" "$OUT/hardware.tar.gz"
}

# step NAME SECONDS FILE COMMAND...: run the command for at most SECONDS, unless it ended in an
# earlier call. Its output goes to FILE at once, its outcome to the summary. It starts if 30 s or
# half of SECONDS are left. What the end of this call stops runs again in the next one.
step() {
  local name=$1 limit=$2 file=$out/$3 grace=5 least room code took began=$SECONDS last
  [[ $3 != tests.txt ]] || grace=13 # pytest-xdist waits 10 s for its workers
  shift 3
  has_ended "$name" && return
  room=$(left) least=$((limit < 60 ? limit / 2 : 30))
  if ((room < least)); then
    later+=("$name")
    return
  fi
  ((room <= limit)) || room=$limit
  printf '\n== %s\n' "$name" >>"$file"
  # An interrupt lets pytest print what it has; a process that ignores it is killed.
  timeout --signal=INT --kill-after=$grace "$((room - grace))" "$@" >>"$file" 2>&1 </dev/null
  code=$? took=$((SECONDS - began)) last=$(tail -n 1 "$file" | cut -c1-160)
  printf '== %s: exit %d\n' "$name" "$code" >>"$file"
  if ((code == 0)); then
    note "$name: ok, $took s"
  elif ((code != 124 && (code != 137 || took < room - grace))); then
    note "$name: FAILED with $code, $took s: $last"
  elif ((room < limit)); then
    note "$name: stopped after $took s, the end of this call"
    later+=("$name")
    return
  else
    note "$name: stopped after $took s, its limit"
  fi
  printf '%s\n' "$name" >>"$ended"
  save
}

note "-- $(date -u +%FT%TZ), $minutes minutes, $key"
[[ -z $reason ]] || note "the benchmarks cannot be imported: $reason"
on_gpu || note "no GPU: tune, tests and benchmarks run on a CPU, ncu and the sanitizer do not run"

# 1. Facts, and what is missing.
facts() {
  "$PYTHON" -m benchmarks.environment
  local code=$? names='torch|triton|transformers|numpy|pytest|pytest-xdist|liger|flash|quack'
  names+='|nvtx|av|setuptools|ninja|pybind11'
  command -v nvidia-smi >/dev/null && nvidia-smi --format=csv \
    --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit
  command -v nvcc >/dev/null && nvcc --version | tail -n 2
  command -v gcc >/dev/null && gcc --version | head -n 1
  "$PYTHON" -m pip list 2>/dev/null | grep -iE "^($names) "
  return $code
}
export -f facts
if ! has_ended facts; then
  step facts 40 facts.txt bash -c facts
  while read -r line; do note "$line"; done < <(grep '^MISSING' "$out/facts.txt" 2>/dev/null)
fi

# 2. Build. Verdicts are of one extension, so another copy of the sources gets this one.
if has_ended build; then
  cp -n "$out"/_C.*.so keye_kernels/ 2>/dev/null
elif command -v nvcc >/dev/null || [[ -n ${CUDA_HOME:-} || -x /usr/local/cuda/bin/nvcc ]]; then
  step build 120 build.txt env KEYE_CUDA=1 "$PYTHON" setup.py build_ext --inplace
  cp keye_kernels/_C.*.so "$out/" 2>/dev/null
else
  note "build: not run, there is no nvcc"
fi

# 3. Tune: every kernel is proved, and timed beside its peers. Ops that the first run did not reach
# get one each. As `python -m keye_kernels tune [--op OP]`, with a line and the time for each case.
tune='
import sys, time
from keye_kernels import tune
def progress(case, done, total):
    print(time.strftime("%T"), f"{done}/{total}", case)
print(tune(op=sys.argv[1] if sys.argv[1:] else None, progress=progress))'
untuned() {
  ask -c '
import keye_kernels
verdicts = keye_kernels.verdicts()
tuned = {row.op for row in verdicts.rows} if verdicts is not None else set()
print(*(op for op in keye_kernels.backends() if op not in tuned))'
}
ask -m keye_kernels tune --show >/dev/null 2>&1 || # there are no verdicts
  step tune 240 tune.txt "$PYTHON" -c "$tune"
for op in $(untuned 2>/dev/null); do
  step "tune, $op" 80 tune.txt "$PYTHON" -c "$tune" "$op"
done

# pyproject.toml has options of plugins that may not be here.
pytest=("$PYTHON" -m pytest -o addopts= -p no:cacheprovider --tb=short)
has() { ask -c "import $1" 2>/dev/null; }
has av || PYTHONPATH+=":$PWD/benchmarks/stand_ins"
model=$(ask -c 'from keye_model import *' 2>&1 | tail -n 1)
[[ -z $model ]] || note "keye_model cannot be imported, what needs it is not run: $model"

# 4. End to end, each in a process of its own: a fault ends the CUDA context of its process.
if [[ -z $model ]]; then
  for part in decode_step tower request; do
    step "end to end, $part" 80 end_to_end.txt "${pytest[@]}" -q \
      "benchmarks/bench_generate.py::bench_$part" --results "$out" --seconds 0.25
  done
fi

# 5. Tests, for what tune does not show. It compares each kernel with its definition at the
# checkpoint's shapes and at a few edges. It does not capture whole steps, nor try strides, other
# dtypes and head sizes, out=, empty input, offsets past 2^31 and torch.compile. Each module
# compiles kernels of its own, so all tests do not fit. Left out are those of the reference, which
# is PyTorch's own code; test_leading_dims, which repeats the ops' other tests at other ranks; and
# all that never touches a GPU.
options=(-v -rfE)
# A worker whose CUDA context a fault has ended is replaced (tests/broken_cuda.py).
has xdist && options+=(-n "$(($(nproc) * 3 / 4 + 1))" --max-worker-restart 40)
# A worker that hangs is ended, which replaces it too.
has pytest_timeout && options+=(--timeout 60 --timeout-method thread)
engine=(cuda_graph workspace vision_batch decode_batch)
engine=("${engine[@]/#/tests/model/engine/test_}")
large=(linear qk_norm_mrope_store paged_decode_attention varlen_attention paged_prefill_attention)
small=(sampling norm rope patch_embed merge_patches activation)
large=("${large[@]/#/tests/kernels/test_}") small=("${small[@]/#/tests/kernels/test_}")
[[ -n $model ]] || step "tests, graphs" 90 tests.txt "${pytest[@]}" "${options[@]}" \
  tests/model/test_cuda_kernels.py tests/model/test_triton.py "${engine[@]/%/.py}"
step "tests, large kernels" 120 tests.txt "${pytest[@]}" "${options[@]}" \
  -k 'triton or cuda' "${large[@]/%/.py}"
step "tests, small kernels" 60 tests.txt "${pytest[@]}" "${options[@]}" \
  -k 'triton or cuda' "${small[@]/%/.py}"

# 6. ncu, on the kernels that lose most and on what they lose to.
if on_gpu && command -v ncu >/dev/null; then
  metrics=gpu__time_duration.sum,dram__bytes.sum
  metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,sm__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active
  metrics+=,launch__registers_per_thread,launch__waves_per_multiprocessor
  mapfile -t gaps < <(ask -m benchmarks.gaps 2>/dev/null)
  if (($(left) < 20)); then
    later+=(ncu)
  elif ((${#gaps[@]} == 0)); then
    note "ncu: not run, tune timed nothing to compare"
  fi
  for i in "${!gaps[@]}"; do
    step "ncu, ${gaps[i]}" 40 ncu.txt ncu --clock-control none --csv --page raw \
      --metrics "$metrics" --target-processes application-only --profile-from-start off \
      --launch-count 40 "$PYTHON" -m benchmarks.gaps "$((i + 1))"
  done
elif on_gpu; then
  note "ncu: not run, it is not there"
fi

# 7. Sanitizers, at small shapes: under them a kernel is ten to a hundred times slower. Without one
# first: that compiles the kernels, and shows what fails by itself.
if on_gpu && command -v compute-sanitizer >/dev/null; then
  step "smallest" 60 sanitizer.txt "$PYTHON" -m benchmarks.smallest
  for tool in memcheck racecheck synccheck initcheck; do
    # Memory from a cache would hide accesses past the end of a tensor.
    step "sanitizer, $tool" 40 sanitizer.txt \
      env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
      --target-processes application-only --error-exitcode 9 --print-limit 20 \
      "$PYTHON" -m benchmarks.smallest
  done
elif on_gpu; then
  note "sanitizer: not run, compute-sanitizer is not there"
fi

if ((${#later[@]})); then
  note "left for the next call: $(printf '%s; ' "${later[@]}")"
fi
note "total: $SECONDS s of $budget s, results in $folder"
save
