#!/usr/bin/env bash
# Runs the tests, on any machine: sets up .venv first.
#   bash scripts/test.sh            the ordinary tests, about 6 minutes on 2 quiet cores
#   bash scripts/test.sh --full     the long ones too
#   bash scripts/test.sh ARGS       goes on to pytest
set -euo pipefail
source "$(dirname "$0")/setup.sh"
workers=$(nproc 2>/dev/null || echo 2)
# a core a worker, so that threads do not fight
export OMP_NUM_THREADS=1
# worksteal: each begins with a part of its own, so that what a file's tests share is made once
exec python -m pytest -n "$((workers < 8 ? workers : 8))" --dist worksteal --durations=10 "$@"
