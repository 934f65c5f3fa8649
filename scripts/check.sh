#!/usr/bin/env bash
# Lint, format and the public functions' types, in seconds; nothing is run. Sets up .venv first.
#   bash scripts/check.sh          what CI asks for before the tests
#   bash scripts/check.sh --fix    mends what ruff can mend, and formats
set -euo pipefail
source "$(dirname "$0")/setup.sh"
if [ "${1:-}" = --fix ]; then
    ruff check --fix --quiet . || true
    ruff format --quiet .
elif [ $# -gt 0 ]; then
    echo "check: got $*, wanted nothing or --fix" >&2
    exit 2
fi

failed=()
# the word for a check, and its command; the next ones are run all the same
check() {
    local start=$SECONDS
    "${@:2}" || failed+=("$1")
    echo "check: $1 took $((SECONDS - start)) s"
}
check lint ruff check --quiet .
check format ruff format --check --quiet .
check types pyrefly check --output-format min-text
if [ ${#failed[@]} -gt 0 ]; then
    echo "check: failed: ${failed[*]}; see above. bash scripts/check.sh --fix mends what a tool can" >&2
    exit 1
fi
