#!/usr/bin/env bash
# Tests and measures this source tree on a machine with an NVIDIA GPU; nothing is installed and no network is used.
set -uo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/gpu_check.sh [--budget SECONDS] [--commit HASH] [--full] [--skip-tests] [--list] [--help]

Runs the benchmark suite (python3 -m benchmarks.suite, whose options these are) from the source tree as it is: builds the
native libraries, tests the operators and the step with their kernels on the GPU, times them, and tunes launch configs.
The parts compile side by side and are timed alone, for 540 seconds unless --budget says else; the same command goes on.
--list shows the parts, --commit says what the rows are of, where the tree is no git checkout.

To the folder $OUT (default: gpu_check) go the rows (suite.jsonl), report.html, summary.txt, and details.tar.gz, a copy
of the suite's folder $DETAILS (default: build/gpu_check): logs, kernel tables, traces.
Needs python3 with torch, triton, numpy, pytest, pytest-benchmark, hypothesis and nvidia-ml-py, and nvcc.
Exit code: 0 all parts passed, 1 a part failed or had no time, 2 no GPU or a wrong argument.
TEXT
}

case " $* " in *" --help "* | *" -h "*) usage && exit 0 ;; esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=$(realpath -m "${OUT:-gpu_check}") DETAILS=$(realpath -m "${DETAILS:-build/gpu_check}")
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
case " $* " in *" --list "*) exec python3 -m benchmarks.suite --list ;; esac
python3 -c 'import torch; raise SystemExit(0 if torch.cuda.is_available() else 1)' || {
    echo "gpu_check: python3's torch sees no NVIDIA GPU here; run it on a machine that has one" >&2
    exit 2
}

mkdir -p "$OUT" "$DETAILS"
{
    date -u +%FT%TZ
    nvidia-smi --format=csv --query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks_throttle_reasons.active
    python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
} >>"$OUT/summary.txt" 2>&1

python3 -m benchmarks.suite --out "$DETAILS" --device cuda "$@" 2> >(tee -a "$OUT/summary.txt" >&2)
result=$?
[[ ! -e $DETAILS/rows.jsonl ]] || cp "$DETAILS/rows.jsonl" "$OUT/suite.jsonl"
[[ ! -e $DETAILS/report.html ]] || cp "$DETAILS/report.html" "$OUT"
tar -C "$DETAILS" -czf "$OUT/details.tar.gz" .
exit $result
