#!/usr/bin/env bash
# One visit to a machine with an NVIDIA GPU: build, test, sanitize, measure. Under ten minutes; README.md says more.
#
#   benchmarks/gpu_run.sh OUT [build|tests|sanitize|bench|sweep|extras|ncu|all]...
#
# Takes the python3 that is there (PYTHON=... for another), installs and downloads nothing. A stage that fails or runs
# out of time doesn't stop the next. OUT gets run.log (everything), summary.txt and each stage's figures.
#
#   LIMIT=300            seconds for each stage, instead of its own limit; all together still end by TOTAL (570)
#   TEST_ARGS, SANITIZE_ARGS, BENCH_ARGS, SWEEP_ARGS, EXTRAS_ARGS, NCU_ARGS    instead of a stage's own arguments
set -uo pipefail

STAGES="build tests sanitize bench sweep extras ncu"
declare -A LIMITS=([build]=80 [tests]=120 [sanitize]=100 [bench]=130 [sweep]=45 [extras]=40 [ncu]=45)
NOT_HERE=77 # exit status of a stage whose tool this machine lacks

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
  # shellcheck disable=SC2086 # arguments are words
  CWCLIP_REQUIRE_GPU=1 "$PYTHON" -m pytest -p no:cacheprovider ${TEST_ARGS:-tests/backends/test_cuda_gpu.py tests/backends/test_training_gpu.py
    tests/core/test_mixed_precision.py tests/test_grad_scaler.py tests/components/test_spec.py tests/test_attach.py
    tests/thresholds/test_thresholds.py
    tests/in_backward/test_in_backward.py tests/telemetry/test_telemetry.py}
}

stage_sanitize() {
  command -v compute-sanitizer || return "$NOT_HERE"
  local tool status worst=0
  # Side by side: most of the time goes into loading torch, and a tool that hangs costs the others nothing.
  for tool in memcheck racecheck initcheck synccheck; do
    {
      sanitize "$tool" >"$SCRATCH/$tool" 2>&1
      echo $? >"$SCRATCH/$tool.status"
    } &
  done
  wait
  for tool in memcheck racecheck initcheck synccheck; do
    status=$(<"$SCRATCH/$tool.status")
    echo "== $tool"
    cat "$SCRATCH/$tool"
    ((status == 0)) || worst=$status
  done
  for tool in memcheck racecheck initcheck synccheck; do
    echo "$tool: exit $(<"$SCRATCH/$tool.status"), $(grep -h 'SUMMARY' "$SCRATCH/$tool" | tail -1)"
  done
  return "$worst"
}

sanitize() {
  local options=(--tool "$1" --error-exitcode 86) limit=$((STAGE_LIMIT - 8)) # time to print what was found
  # Our kernels alone, for speed. initcheck has to see torch's too, or what they wrote would pass for unwritten.
  [[ $1 == initcheck ]] || options+=(--kernel-name kns=cwclip)
  # Torch's cache of memory would hide a read past a tensor's end and hand out what others have written.
  [[ $1 == memcheck || $1 == initcheck ]] && export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  # CUDA graphs need that cache.
  # shellcheck disable=SC2086
  timeout --kill-after=3 $((limit > 1 ? limit : 1)) compute-sanitizer "${options[@]}" \
    "$PYTHON" -m pytest -p no:cacheprovider -q ${SANITIZE_ARGS:-tests/backends/test_cuda_gpu.py -k "not(graph)"}
}

stage_bench() {
  local defaults="--device cuda --rounds 15 --seconds 3 --sets bert-base,roberta-large,roberta-large:bfloat16"
  defaults+=",llama3-8b,lora-384,views-2000,tiny-20000"
  # shellcheck disable=SC2086
  "$PYTHON" benchmarks/compare.py ${BENCH_ARGS:-$defaults} --json "$OUT/bench.json" --roofline "$OUT/roofline.png"
}

stage_sweep() {
  local defaults="--device cuda --rounds 15 --seconds 2 --sets bert-base,roberta-large:bfloat16,lora-384"
  defaults+=" --clipped none,all --calls clipper --torch none --backends "
  defaults+=$(printf 'cuda:form%d:blocks%d,' 1 1 1 2 1 3 1 4 2 1 2 2 2 3 2 4)
  # shellcheck disable=SC2086
  "$PYTHON" benchmarks/compare.py ${SWEEP_ARGS:-${defaults%,}} --json "$OUT/sweep.json"
}

stage_extras() {
  # shellcheck disable=SC2086
  "$PYTHON" benchmarks/extras.py ${EXTRAS_ARGS:---device cuda --set bert-base} --json "$OUT/extras.json" &&
    "$PYTHON" benchmarks/memory.py --model bert-large --tokens 128 --json "$OUT/memory.json"
}

stage_ncu() {
  command -v ncu || return "$NOT_HERE"
  # shellcheck disable=SC2086
  "$PYTHON" benchmarks/traffic.py ${NCU_ARGS:---device cuda} --csv "$OUT/ncu.csv"
}

# ---------------------------------------------------------------------------------------------------------------
# Running them
# ---------------------------------------------------------------------------------------------------------------

run_stage() {
  local stage=$1 began=$SECONDS left=$((TOTAL - SECONDS)) status word
  export STAGE_LIMIT=${LIMIT:-${LIMITS[$stage]}}
  ((STAGE_LIMIT <= left)) || STAGE_LIMIT=$left
  echo "==== $stage, at most $STAGE_LIMIT s"
  if ((left < 10)); then # not worth beginning
    status=124
  else
    timeout --kill-after=3 "$STAGE_LIMIT" bash -uo pipefail -c "stage_$stage" 2>&1 | tee -a "$OUT/run.log" | tail -n 40
    status=${PIPESTATUS[0]}
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
  (($# >= 1)) || usage
  local stage failed=0 wanted=()
  mkdir -p "$1" && OUT=$(cd "$1" && pwd) || exit
  shift
  for stage in "${@:-all}"; do
    case " $STAGES all " in
      *" $stage "*) ;;
      *) usage ;;
    esac
    if [[ $stage == all ]]; then read -ra wanted <<<"$STAGES"; else wanted+=("$stage"); fi
  done
  cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
  PYTHON=$(command -v "${PYTHON:-python3}") || { echo "no ${PYTHON:-python3} here" >&2 && exit 1; }
  SCRATCH=$(mktemp -d)
  trap 'rm -rf "$SCRATCH"' EXIT
  TOTAL=${TOTAL:-570}
  export OUT PYTHON SCRATCH NOT_HERE
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
  export -f stage_build stage_tests stage_sanitize sanitize stage_bench stage_sweep stage_extras stage_ncu
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
