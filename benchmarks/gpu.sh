#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under nine minutes: the tests marked `cuda` first (stops if they are red), the check that every kernel
# variant compiles without spilling, then the benchmarks, each bounded in time. Writes JSON and one log; prints a short table last.
#
# Usage: benchmarks/gpu.sh [OUT_DIR]     (default benchmarks/results)
# Needs in PYTHON (default python3): torch with CUDA, triton, safetensors, fastcore, tqdm, pytest. Nothing is installed or downloaded.
# PYTHON=…       the interpreter
# TOTAL=530      seconds for everything
# TEST_SECONDS=170   of which the tests may use
# LEAST=15       seconds under which no further step is started
# SKIP_TESTS=1   go straight to the benchmarks
# TINY=1         run without a GPU on tiny shapes: a check of this script
set -u
cd "$(dirname "$0")/.." || exit 2
out=${1:-benchmarks/results}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
python=${PYTHON:-python3} log=$out/gpu.log total=${TOTAL:-530} least=${LEAST:-15} status=0
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET # the interpreter would hide the compiled kernels
: >"$log"
stamp=$(mktemp) # results older than this are not of this run
trap 'rm -f "$stamp"' EXIT

remaining() { echo $((total - SECONDS)); }

# step NAME LIMIT COMMAND...: at most LIMIT seconds, and no more than remain; output goes to the log
step() {
    local name=$1 limit=$2 rc started=$SECONDS
    shift 2
    [ "$(remaining)" -lt "$limit" ] && limit=$(remaining)
    if [ "$limit" -lt "$least" ]; then echo "$name: skipped, no time left" | tee -a "$log"; return 1; fi
    echo "+ $*" >>"$log"
    timeout -k 5 "$limit" "$@" >>"$log" 2>&1; rc=$?
    case $rc in 0) ;; 124 | 137) echo "$name: stopped after $limit s (what was finished is written)" | tee -a "$log" ;; *) echo "$name: exit status $rc" | tee -a "$log" ;; esac
    echo "$name: $((SECONDS - started)) s" | tee -a "$log"
    return $rc
}

args=()
if [ "${TINY:-0}" = 1 ]; then args=(--device cpu --tiny)
else
    "$python" -c 'import torch, triton, safetensors, fastcore, tqdm, pytest, sys; sys.exit("no CUDA device") if not torch.cuda.is_available() else print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)' || exit 2
fi

if [ "${SKIP_TESTS:-0}" != 1 ]; then
    # only the files that hold such tests: others import packages that a GPU machine may lack
    files=$(grep -rlE --include='test_*.py' 'mark\.cuda' tests; ls tests/test_kernels_*.py 2>/dev/null)
    files=$(echo "$files" | sort -u)
    [ -n "$files" ] || { echo "no test is marked cuda"; exit 1; }
    # shellcheck disable=SC2086
    if ! step "cuda tests" "${TEST_SECONDS:-170}" "$python" -m pytest -m cuda -q --maxfail=5 -p no:cacheprovider $files; then
        tail -n 60 "$log"
        echo "RED: the tests on the device failed (or there are none), nothing is measured"
        exit 1
    fi
    grep -E '[0-9]+ (passed|skipped)' "$log" | tail -n 1
fi

if [ -f benchmarks/compile_report.py ]; then step "compile report" 60 "$python" benchmarks/compile_report.py "$out/compile.json" || status=1; fi
if [ -f benchmarks/merge_gpu.py ]; then step "merge" 75 "$python" benchmarks/merge_gpu.py --out "$out/merge_gpu.json" "${args[@]}" || status=1; fi
step "reconstruct" 165 "$python" benchmarks/reconstruct_gpu.py --out "$out/reconstruct_gpu.json" --seconds 140 "${args[@]}" || status=1
step "interference" 125 "$python" benchmarks/interference_gpu.py --out "$out/interference_gpu.json" --seconds 100 "${args[@]}" || status=1

echo "== errors and results (details in $log)"
results=()
for f in "$out/reconstruct_gpu.json" "$out/interference_gpu.json"; do [ "$f" -nt "$stamp" ] && results+=("$f"); done
[ ${#results[@]} -gt 0 ] && "$python" benchmarks/compare.py "${results[@]}"
echo "total: $SECONDS s, status $status"
exit $status
