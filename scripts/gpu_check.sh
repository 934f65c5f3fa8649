#!/usr/bin/env bash
# Checks and measures this source tree on a machine with an NVIDIA GPU; nothing is installed and no network is used.
set -uo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/gpu_check.sh [--list] [--help] [--commit HASH] [PART...]

Runs the parts in this order (default: all), each within 9 minutes, from the source tree as it is:

  build      the native libraries, in place (c++ and nvcc; the captured step needs them)
  static     registers, spills, shared memory and load widths of every launch config, on this machine's Triton
  tests      the tests of the operators with their kernels on the GPU, and every other test that needs one
  suite      the benchmark suite's quick run: its tests, B/4 and XL/2, the operators, a report
  attention  attention timed against SDPA, math attention under torch.func.jvp, and the peers that are installed
  pointwise  the other operators and the optimizer timed against plain torch, eager and compiled
  step-b4    B/4's training step at batch 256: naive, compiled, captured; with and without guidance
  step-xl2   XL/2's at batch 32: ours, and the derivative's overhead
  naive-xl2  XL/2's as public trainers make it, eager and compiled, beside ours

To the folder $OUT (default: gpu_check) go the result rows (rows.jsonl, appended), summary.txt, of the suite its rows
(suite.jsonl) and report.html, and details.tar.gz, a copy of the folder $DETAILS (default: build/gpu_check): the logs,
and the suite's folder, from which it resumes.
--commit says what the rows are of, where the tree is no git checkout.
Needs python3 with torch, triton, numpy, pytest, pytest-benchmark, hypothesis and nvidia-ml-py.
Exit code: 0 all parts passed, 1 a part failed, 2 no GPU or a wrong argument.
TEXT
}

PARTS=(build static tests suite attention pointwise step-b4 step-xl2 naive-xl2)
LIMIT=540

build() {
    local begin
    begin=$(date +%s)
    run python3 setup.py -q build_ext --inplace || return 1
    # to setup.py a library that is not built is a warning, and one of an older tree may lie there
    run python3 -c "$BUILT" "$begin"
}

BUILT='
import sys
from pathlib import Path

import meanflow_kernels
from meanflow_kernels.adamw_ema.native import MISSING

libraries = [Path(meanflow_kernels.__file__).with_name(f"native_{name}.so") for name in ("cpu", "cuda")]
old = [p.name for p in libraries if p.exists() and p.stat().st_mtime < float(sys.argv[1])]
wrong = [*dict.fromkeys(MISSING.values()), *(f"{name} was not built, it is older than this run" for name in old)]
sys.exit("\n".join(wrong and [*wrong, "what the compilers said is above; nvcc has to be in CUDA_HOME or the PATH"]) or 0)
'

static() {
    run python3 -m benchmarks.static_report
}

tests() {
    # several processes, because compiling the kernels takes longer than running them
    local workers=() failed=0 others
    python3 -c 'import xdist' 2>/dev/null && workers=(-n 6)
    # the part static compiles every config already
    run python3 -m pytest -q "${workers[@]}" --ignore=tests/kernels/test_static_report.py tests/kernels || failed=1
    # files without such tests may import what this machine lacks
    mapfile -t others < <(grep -rl --include='test_*.py' 'mark\.gpu' tests | grep -v '^tests/kernels/')
    ((${#others[@]} == 0)) || run python3 -m pytest -q "${workers[@]}" -m gpu "${others[@]}" || failed=1
    return $failed
}

suite() {
    local failed=0
    # it ends itself after 8 minutes
    run python3 -m benchmarks.suite --out "$DETAILS/suite" "${COMMIT[@]}" || failed=1
    [[ ! -e $DETAILS/suite/rows.jsonl ]] || cp "$DETAILS/suite/rows.jsonl" "$OUT/suite.jsonl"
    [[ ! -e $DETAILS/suite/report.html ]] || cp "$DETAILS/suite/report.html" "$OUT"
    return $failed
}

attention() {
    bench attention
}

pointwise() {
    local failed=0
    bench adaln gate_adaln bias_gelu silu linear timestep_embedding || failed=1
    run python3 -m benchmarks.optimizer --rows "$OUT/rows.jsonl" "${COMMIT[@]}" || failed=1
    return $failed
}

step-b4() {
    local failed=0
    step --model B/4 --batch 256 --compare naive,naive-compiled,ours-eager,ours,ours-captured || failed=1
    step --model B/4 --batch 256 --kappa 0 --compare ours,ours-captured || failed=1
    return $failed
}

step-xl2() {
    local failed=0
    step --model XL/2 --batch 32 --compare ours,ours-captured || failed=1
    # what the derivative costs: a quarter of the samples with r < t over none
    step --model XL/2 --batch 32 --kappa 0 --compare ours-captured || failed=1
    step --model XL/2 --batch 32 --kappa 0 --share 0 --compare ours-captured || failed=1
    return $failed
}

naive-xl2() {
    step --model XL/2 --batch 32 --compare naive,naive-compiled,ours-captured
}

step() {
    run python3 -m benchmarks.step "$@" --rows "$OUT/rows.jsonl" "${COMMIT[@]}"
}

# a process a bench, so that a peer that breaks the process breaks no other
bench() {
    local failed=0 op
    for op in "$@"; do
        run python3 -m pytest -q -rs --benchmark-quiet --rows "$OUT/rows.jsonl" "${COMMIT[@]}" \
            "benchmarks/bench_$op.py" || failed=1
    done
    return $failed
}

# a command within what is left of the part's time
run() {
    local left=$((DEADLINE - SECONDS))
    if ((left <= 0)); then
        echo "gpu_check: out of time before: $*"
        return 124
    fi
    timeout -k 10 "$left" "$@"
}

COMMIT=()
chosen=()
while (($#)); do
    case $1 in
    --help | -h) usage && exit 0 ;;
    --list) printf '%s\n' "${PARTS[@]}" && exit 0 ;;
    --commit)
        [[ $# -ge 2 ]] || { echo "gpu_check: --commit wants a hash" >&2 && exit 2; }
        COMMIT=(--commit "$2")
        shift
        ;;
    *)
        [[ " ${PARTS[*]} " == *" $1 "* ]] || {
            echo "gpu_check: no part '$1', wanted some of: ${PARTS[*]}" >&2
            exit 2
        }
        chosen+=("$1")
        ;;
    esac
    shift
done
((${#chosen[@]})) || chosen=("${PARTS[@]}")

cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=$(realpath -m "${OUT:-gpu_check}") DETAILS=$(realpath -m "${DETAILS:-build/gpu_check}")
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
python3 -c 'import torch; raise SystemExit(0 if torch.cuda.is_available() else 1)' || {
    echo "gpu_check: python3's torch sees no NVIDIA GPU here; run it on a machine that has one" >&2
    exit 2
}

mkdir -p "$OUT" "$DETAILS/logs"
{
    date -u +%FT%TZ
    nvidia-smi --format=csv --query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks_throttle_reasons.active
    python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
} >>"$OUT/summary.txt" 2>&1

failed=0
table=$(printf '%-10s %-8s %8s  %s' part result seconds log)
for part in "${chosen[@]}"; do
    echo "gpu_check: $part ..."
    begin=$SECONDS DEADLINE=$((SECONDS + LIMIT)) log=$DETAILS/logs/$part.log
    if "$part" >"$log" 2>&1; then
        result=passed
    else
        result=FAILED failed=1
        tail -n 25 "$log" | cut -c1-200
    fi
    table+=$'\n'$(printf '%-10s %-8s %8d  %s' "$part" "$result" $((SECONDS - begin)) "logs/$part.log")
    # whatever happens to the next
    tar -C "$DETAILS" -czf "$OUT/details.tar.gz" .
done
echo "$table" | tee -a "$OUT/summary.txt"
exit $failed
