#!/usr/bin/env bash
# A visit to a machine with an NVIDIA GPU, in three calls that each end within nine minutes; README.md says more.
#
#   benchmarks/gpu_run.sh OUT check|speed|detail
#   benchmarks/gpu_run.sh OUT build|tests|sanitize|bench|sweep|step|extras|ncu...
#
#   check     build, tests, sanitize       does it run, and right?
#   speed     build, bench, sweep, step    how fast is it?
#   detail    build, extras, ncu           what does the rest of a training step cost, and what moves through memory?
#
# Takes the python3 that is there (PYTHON=... for another), installs and downloads nothing. A stage that fails or runs
# out of time doesn't stop the next. OUT gets run.log (everything), summary.txt and each stage's figures; of each stage
# the end is printed, and a line for each stage at last: 12,000 characters at most.
#
#   LIMIT=300            seconds for each stage, instead of its own limit; all together still end by TOTAL (530)
#   TEST_ARGS, SANITIZE_ARGS, BENCH_ARGS, SWEEP_ARGS, STEP_ARGS, EXTRAS_ARGS, NCU_ARGS    instead of a stage's own
set -uo pipefail

declare -A STAGES_OF=([check]="build tests sanitize" [speed]="build bench sweep step" [detail]="build extras ncu")
declare -A LIMITS=([build]=110 [tests]=250 [sanitize]=150 [bench]=220 [sweep]=90 [step]=90 [extras]=170 [ncu]=200)
# Characters of a stage's output that are printed; those of a call add up to less than 12,000.
declare -A SHOWN=([build]=700 [tests]=6000 [sanitize]=3500 [bench]=5600 [sweep]=2200 [step]=2000 [extras]=5500 [ncu]=4500)
NOT_HERE=77 # exit status of a stage whose tool this machine lacks
TOOLS="memcheck racecheck initcheck synccheck"

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit 2
}

# ---------------------------------------------------------------------------------------------------------------
# Stages. Each runs in a shell of its own, under its time limit, in the repository's root.
# ---------------------------------------------------------------------------------------------------------------

stage_build() {
  # This machine's own architecture and no other: less to compile.
  export TORCH_CUDA_ARCH_LIST
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c "
import torch
print('%d.%d' % torch.cuda.get_device_capability())")} || return
  echo "for $TORCH_CUDA_ARCH_LIST"
  CWCLIP_BUILD=cuda "$PYTHON" setup.py build_ext --inplace && "$PYTHON" -m cwclip_kernels
}

stage_tests() {
  local workers=()
  # Most of the time goes into compiling Triton's kernels, which several processes share out.
  "$PYTHON" -c "import xdist" 2>/dev/null && workers=(-p xdist.plugin -n "${WORKERS:-8}" --dist worksteal)
  # An interrupted pytest still says what has failed so far.
  # shellcheck disable=SC2086 # arguments are words
  timeout --signal=INT --kill-after=8 $((STAGE_LIMIT > 30 ? STAGE_LIMIT - 12 : STAGE_LIMIT)) \
    "$PYTHON" -m pytest $PYTEST_OPTIONS "${workers[@]}" ${TEST_ARGS:--m not(ranks) tests/backends/test_cuda_gpu.py tests/backends/test_step_gpu.py
    tests/backends/test_training_gpu.py
    tests/backends/test_triton_kernels.py tests/backends/test_triton_step.py tests/backends/test_triton_step_kernels.py
    tests/backends/test_triton_step_single.py tests/backends/test_triton_tables.py
    tests/core/test_mixed_precision.py tests/test_grad_scaler.py tests/thresholds/test_thresholds.py
    tests/components/test_spec.py tests/test_attach.py tests/core/test_nonfinite.py
    tests/telemetry/test_telemetry.py tests/telemetry/test_telemetry_again.py
    tests/in_backward/test_in_backward.py tests/in_backward/test_in_backward_adamw.py
    tests/in_backward/test_in_backward_clipper.py tests/in_backward/test_in_backward_handle.py
    tests/in_backward/test_in_backward_passes.py tests/in_backward/test_in_backward_steps.py
    tests/optim/test_adamw_step.py tests/optim/test_adamw_alone.py tests/optim/test_adamw_changes.py
    tests/optim/test_adamw_drop_in.py}
}

stage_sanitize() {
  command -v compute-sanitizer || return "$NOT_HERE"
  local tool worst=0 found said
  # Side by side: most of the time goes into loading torch, and a tool that hangs costs the others nothing.
  for tool in $TOOLS; do
    {
      sanitize "$tool" >"$SCRATCH/$tool" 2>&1
      echo $? >"$SCRATCH/$tool.status"
    } &
  done
  wait
  for tool in $TOOLS; do
    echo "== $tool"
    cat "$SCRATCH/$tool"
  done
  # What the tool found and how the tests ended, each by itself: a test may fail under a tool that finds nothing.
  for tool in $TOOLS; do
    found=$(grep -h 'SUMMARY' "$SCRATCH/$tool" | tail -1)
    said=$(grep -hE '^[0-9]+ [a-z]+.* in [0-9]' "$SCRATCH/$tool" | tail -1)
    echo "$tool: ${found:-no verdict}; tests: ${said:-no result} (exit $(<"$SCRATCH/$tool.status"))"
    [[ $found == *" 0 errors"* || $found == *" 0 hazards"* ]] || worst=1
    [[ $(<"$SCRATCH/$tool.status") == 0 ]] || worst=1
  done
  return "$worst"
}

sanitize() {
  local options=(--tool "$1" --error-exitcode 86 --print-limit 20) limit=$((STAGE_LIMIT - 8)) # time to print it
  # Our kernels alone, for speed. initcheck has to see torch's too, or what they wrote would pass for unwritten.
  [[ $1 == initcheck ]] || options+=(--kernel-name kns=cwclip)
  # Torch's cache of memory would hide a read past a tensor's end and hand out what others have written.
  [[ $1 == memcheck || $1 == initcheck ]] && export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  # shellcheck disable=SC2086
  timeout --kill-after=3 $((limit > 1 ? limit : 1)) compute-sanitizer "${options[@]}" \
    "$PYTHON" -m pytest $PYTEST_OPTIONS \
    ${SANITIZE_ARGS:-tests/backends/test_cuda_gpu.py tests/backends/test_step_gpu.py -m sanitized -k not(triton)}
}

stage_bench() {
  local sets="bert-base,roberta-large,roberta-large:bfloat16,lora-384,views-2000,llama3-8b,tiny-20000" status
  # Torch's loop takes seconds for 20,000 tensors.
  # shellcheck disable=SC2086
  "$PYTHON" benchmarks/compare.py ${BENCH_ARGS:---device cuda --rounds 15 --seconds 3 --sets $sets
    --skip loop@tiny-20000} --json "$OUT/bench.json" --roofline "$OUT/roofline.png"
  status=$?
  "$PYTHON" benchmarks/digest.py "$OUT/bench.json"
  return "$status"
}

stage_sweep() {
  local status backends=()
  backends=(cuda:form1:blocks{2,3,4} cuda:form1:nopdl cuda:form2:blocks{2,3,4} cuda:form2:hints)
  # shellcheck disable=SC2086
  "$PYTHON" benchmarks/compare.py ${SWEEP_ARGS:---device cuda --rounds 15 --seconds 2 --clipped none,all
    --sets bert-base,roberta-large:bfloat16,lora-384,llama3-8b --calls clipper --torch none
    --backends $(IFS=,; echo "${backends[*]}")} --json "$OUT/sweep.json"
  status=$?
  "$PYTHON" benchmarks/digest.py "$OUT/sweep.json"
  return "$status"
}

stage_step() {
  local dtype worst=0
  for dtype in float32 bfloat16; do
    # shellcheck disable=SC2086
    "$PYTHON" benchmarks/optimizer_step.py ${STEP_ARGS:---device cuda --rounds 15 --sets bert-large,lora-384
      --backends cuda,triton} --dtype "$dtype" --state-dtype float32 --json "$OUT/step_$dtype.json" || worst=$?
  done
  "$PYTHON" benchmarks/digest.py "$OUT/step_float32.json" "$OUT/step_bfloat16.json"
  return "$worst"
}

stage_extras() {
  # shellcheck disable=SC2086
  "$PYTHON" benchmarks/extras.py ${EXTRAS_ARGS:---device cuda --set bert-base} --json "$OUT/extras.json" &&
    "$PYTHON" benchmarks/memory.py --model bert-large --tokens 128 --json "$OUT/memory.json"
}

stage_ncu() {
  command -v ncu || return "$NOT_HERE"
  # Ours alone, and none with a kernel for each tensor: ncu takes its time over every launch.
  # shellcheck disable=SC2086
  "$PYTHON" benchmarks/traffic.py ${NCU_ARGS:---device cuda --clipped none,all --torch none
    --backends cuda:form1,cuda:form2,triton} --csv "$OUT/ncu.csv"
}

# ---------------------------------------------------------------------------------------------------------------
# Running them
# ---------------------------------------------------------------------------------------------------------------

run_stage() {
  local stage=$1 began=$SECONDS left=$((TOTAL - SECONDS)) status word
  export STAGE_LIMIT=${LIMIT:-${LIMITS[$stage]}}
  ((STAGE_LIMIT <= left)) || STAGE_LIMIT=$left
  echo "==== $stage, at most $STAGE_LIMIT s" | tee -a "$OUT/run.log"
  if ((left < 10)); then # not worth beginning
    status=124
  else
    timeout --kill-after=3 "$STAGE_LIMIT" bash -uo pipefail -c "stage_$stage" 2>&1 |
      tee -a "$OUT/run.log" >"$SCRATCH/output"
    status=${PIPESTATUS[0]}
    tail -c "${SHOWN[$stage]}" "$SCRATCH/output"
  fi
  case $status in
    0) word=passed ;;
    "$NOT_HERE") word="not here" ;;
    124 | 137) word="out of time" ;;
    *) word="failed, exit $status" ;;
  esac
  printf '%-9s %-16s %4d s\n' "$stage" "$word" $((SECONDS - began)) | tee -a "$OUT/summary.txt" "$OUT/run.log"
  [[ $word == passed || $word == "not here" ]]
}

main() {
  (($# >= 2)) || usage
  local stage name failed=0 wanted=() own=()
  for name in "${@:2}"; do
    read -ra own <<<"${STAGES_OF[$name]:-$name}"
    wanted+=("${own[@]}")
  done
  for stage in "${wanted[@]}"; do
    [[ -n ${LIMITS[$stage]:-} ]] || usage
  done
  mkdir -p "$1" && OUT=$(cd "$1" && pwd) || exit
  cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
  PYTHON=$(command -v "${PYTHON:-python3}") || { echo "no ${PYTHON:-python3} here" >&2 && exit 1; }
  SCRATCH=$(mktemp -d)
  trap 'rm -rf "$SCRATCH"' EXIT
  TOTAL=${TOTAL:-530}
  export OUT PYTHON SCRATCH NOT_HERE TOOLS
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
  # Plugins of packages that happen to be installed there have no say in our tests, and a warning of theirs fails none.
  export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 CWCLIP_REQUIRE_GPU=1
  export PYTEST_OPTIONS="-p no:cacheprovider -q --tb=short -W default"
  export -f sanitize stage_build stage_tests stage_sanitize stage_bench stage_sweep stage_step stage_extras
  export -f stage_ncu
  {
    date --utc +%FT%TZ
    "$PYTHON" --version
    nvcc --version 2>/dev/null | tail -1
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
  } | tee -a "$OUT/run.log"
  : >"$OUT/summary.txt"
  for stage in "${wanted[@]}"; do
    run_stage "$stage" || failed=1
  done
  echo "==== summary" && cat "$OUT/summary.txt"
  return "$failed"
}

main "$@"
