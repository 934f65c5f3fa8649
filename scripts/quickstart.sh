#!/usr/bin/env bash
# One-step generation of real digits, trained here in minutes: sets up .venv, trains, samples, reports.
#   bash scripts/quickstart.sh              writes runs/quickstart/samples.png, report.md and report.json
#   bash scripts/quickstart.sh --help       its options
set -euo pipefail
source "$(dirname "$0")/setup.sh"
exec python scripts/quickstart.py "$@"
