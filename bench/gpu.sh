#!/usr/bin/env bash
# GPU tests, memory and race checker, benchmark table, on one GPU in under 8 minutes.
#
#   bench/gpu.sh              writes bench/results/<gpu>.json and .md, and a log of each stage
#   OUT=folder bench/gpu.sh   writes there
#   bench/gpu.sh --dry-run    without a GPU: the same stages on tiny sizes, Triton interpreted
#
# Needs torch (with Triton), numpy, pytest, pytest-benchmark, ninja and pybind11; no network and no
# installation of fastood. A stage that fails or runs out of time does not stop the next one.
# Exit status: 0 all right, 1 something failed, 2 no GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PYTHON=${PYTHON:-python3}
results=bench/results
dry=()
limit=465
if [[ "${1:-}" == "--dry-run" ]]; then
    dry=(--dry-run)
    limit=1500
    results=.benchmarks/gpu-dry-run
    export TRITON_INTERPRET=1 FASTOOD_JIT=${FASTOOD_JIT:-0}
elif [[ $# -gt 0 ]]; then
    sed -n '2,12p' "$0"
    exit 1
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export PATH="$PATH:/usr/local/cuda/bin"
export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-4}
# where platformdirs, which is not needed here, would put it
export FASTOOD_CACHE=${FASTOOD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/fastood}

if [[ ${#dry[@]} -eq 0 ]]; then
    "$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 2)'
    case $? in
        0) ;;
        2)
            echo "bench/gpu.sh: no CUDA device that torch can use;" \
                "--dry-run shows that the script works" >&2
            exit 2
            ;;
        *)
            echo "bench/gpu.sh: $PYTHON cannot import torch; PYTHON=... names another" >&2
            exit 1
            ;;
    esac
fi

OUT=${OUT:-$results}
mkdir -p "$OUT" || exit 1
LIMIT_S=${LIMIT_S:-$limit}
start=$SECONDS
failed=()

left() { echo $((LIMIT_S - (SECONDS - start))); }

# stage NAME LIMIT RESERVE COMMAND...: run it into a log; RESERVE seconds are kept for later stages
stage() {
    local name=$1 limit=$2 reserve=$3 log="$OUT/$1.log" began=$SECONDS status seconds
    shift 3
    seconds=$(($(left) - reserve))
    ((seconds > limit)) && seconds=$limit
    if ((seconds < 5)); then
        echo "== $name: no time left"
        failed+=("$name (no time)")
        return 1
    fi
    timeout -k 5 "$seconds" "$@" >"$log" 2>&1
    status=$?
    case $status in
        0) echo "== $name: ok, $((SECONDS - began)) s" ;;
        124 | 137) echo "== $name: stopped after $((SECONDS - began)) s, see $log" ;;
        *) echo "== $name: exit status $status after $((SECONDS - began)) s, see $log" ;;
    esac
    ((status == 0)) || failed+=("$name ($status)")
    return $status
}

# Compilers first, side by side: the C++ and CUDA extensions, and what the benchmark's cases need.
warm() {
    local n=6 i pids=() failures=0
    if [[ ${#dry[@]} -gt 0 ]]; then
        "$PYTHON" -m bench.gpu --dry-run --warm 0/20 --out "$OUT"
        return
    fi
    "$PYTHON" -c 'from fastood.ops import loader; loader.cpu()' &
    pids+=($!)
    if command -v nvcc >/dev/null; then
        "$PYTHON" -c 'from fastood.ops import loader; loader.cuda()' &
        pids+=($!)
    else
        echo "no nvcc: the CUDA C++ kernels are left out"
    fi
    "$PYTHON" -m bench.gpu.small --seconds 60 &
    pids+=($!)
    for ((i = 0; i < n; i++)); do
        "$PYTHON" -m bench.gpu --warm "$i/$n" --out "$OUT" &
        pids+=($!)
    done
    for i in "${pids[@]}"; do
        wait "$i" || failures=$((failures + 1))
    done
    return $((failures > 0))
}

# One file: its GPU tests; of tests/kernels and tests/gpu all that is not slow (they run on the GPU
# where there is one).
test_file() {
    local chosen=gpu status
    [[ $1 == tests/kernels/* || $1 == tests/gpu/* ]] && chosen="gpu or not slow"
    "$PYTHON" -m pytest -v --tb=short -p no:cacheprovider --durations=5 -m "$chosen" "$1"
    status=$?
    ((status == 5)) && status=0 # none is left
    return $status
}

# Files with tests for a GPU; others may need packages that are not here. What is compiled for other
# GPUs is not tested here.
gpu_test_files() {
    { find tests/kernels -name 'test_*.py' ! -name '*aot*'
      ! "$PYTHON" -c 'import open_clip' 2>/dev/null || find tests/gpu -name 'test_*.py'
      grep -rl 'mark\.gpu' tests/{cuda,detectors,metrics,ops,scores,tuning} --include='test_*.py'; } |
        sort -u
}

# Some files at a time: compiling kernels takes longest, on one core each.
gpu_tests() {
    if [[ ${#dry[@]} -gt 0 ]]; then
        gpu_test_files | xargs "$PYTHON" -m pytest -q --collect-only -p no:cacheprovider
    else
        gpu_test_files | xargs -P "$(($(nproc) > 8 ? 6 : 1))" -n 1 bash -c 'test_file "$0"'
    fi
}

# A checker refuses some drivers and sandboxes: then it says so here and counts as left out.
sanitize() {
    local tool=$1 seconds=$2
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        --print-limit 20 "$PYTHON" -m bench.gpu.small --seconds "$seconds"
}

# The measuring process ends with 75 if a kernel hung or broke the device: go on behind that case.
measure() {
    local end=$((SECONDS + $1)) status more=() attempt
    for attempt in 1 2 3 4; do
        "$PYTHON" -m bench.gpu --out "$OUT" --seconds $((end - SECONDS)) \
            ${more[@]+"${more[@]}"} ${dry[@]+"${dry[@]}"}
        status=$?
        ((status == 75 && end - SECONDS > 10)) || return $status
        echo "attempt $attempt: the device had to be given up, resuming"
        more=(--resume)
    done
    return $status
}

# functions as commands of `timeout`
export -f warm test_file gpu_test_files gpu_tests sanitize measure
export PYTHON OUT
export DRY="${dry[*]-}"
call() { stage "$1" "$2" "$3" bash -c 'dry=($DRY); "$@"' _ "${@:4}"; }

main() {
    stage environment 30 400 "$PYTHON" -m bench.gpu.facts
    local environment=$? tool seconds
    ((${#dry[@]})) && ((environment == 2)) && failed=()
    [[ ! -f "$OUT/environment.log" ]] || cat "$OUT/environment.log"

    call build 75 330 warm
    call tests 120 250 gpu_tests
    [[ -f "$OUT/tests.log" ]] || : >"$OUT/tests.log"
    echo "   $(grep -c ' PASSED' "$OUT/tests.log") passed, $(grep -cE ' (FAILED|ERROR)' "$OUT/tests.log")" \
        "failed, $(grep -c ' SKIPPED' "$OUT/tests.log") skipped"
    grep -hE '^(FAILED|ERROR)' "$OUT/tests.log" | cut -c1-200 | head -n 8

    if [[ ${#dry[@]} -gt 0 ]]; then
        stage small 300 0 "$PYTHON" -m bench.gpu.small --dry-run
    elif command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck; do
            call "$tool" 45 185 sanitize "$tool" 28
            if grep -qsiE 'not supported|unsupported|failed to initialize|no CUDA device' "$OUT/$tool.log" &&
                ! grep -qs '^ran ' "$OUT/$tool.log"; then
                echo "   the checker cannot work on this machine: left out"
                unset 'failed[-1]'
            fi
            grep -hsE 'ERROR SUMMARY|RACECHECK SUMMARY|^FAILED|no time' "$OUT/$tool.log" | head -n 4
        done
    else
        echo "== memory and race checker: compute-sanitizer is not installed, left out"
    fi

    seconds=$(($(left) - 15))
    call benchmark "$seconds" 8 measure $((seconds - 30))
    "$PYTHON" -m bench.gpu --out "$OUT" --summary ${dry[@]+"${dry[@]}"} | cut -c1-230
    echo "== $((SECONDS - start)) s in all; results in $OUT"
    if ((${#failed[@]})); then
        echo "== NOT OK: ${failed[*]}"
        return 1
    fi
    echo "== OK"
}

main; exit # on one line: the file may change while this runs
