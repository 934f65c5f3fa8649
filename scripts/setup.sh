# Sourced by the commands: makes or reuses the virtual environment .venv at the root, and activates it.
# PYTHON names the interpreter to make it with (3.11 or newer).

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
root=$PWD
torch_version=2.13.0 triton_version=3.7.1

say() { printf '\033[2m[setup] %s\033[0m\n' "$1"; }

find_python() {
    local python
    for python in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    echo "setup: python: found none of 3.11 or newer; install one, or name it: PYTHON=/path/to/python3.11" >&2
    return 1
}

# anything that decides what gets installed
fingerprint() {
    (cd "$root" && cat setup.py pyproject.toml scripts/setup.sh $(find csrc -type f | LC_ALL=C sort) && pwd && .venv/bin/python -V) | cksum
}

install_torch() {
    .venv/bin/python -c 'import torch' 2>/dev/null && return
    if [ ! -e /proc/driver/nvidia/version ] && ! command -v nvidia-smi >/dev/null; then
        say "no NVIDIA driver: torch $torch_version, the CPU build if an index has it"
        .venv/bin/pip install -qq "torch==$torch_version+cpu" 2>/dev/null && return
        say "no index offers the CPU build (README, Install, says which does): taking the ordinary one, several GB"
    fi
    say "torch $torch_version"
    .venv/bin/pip install -qq "torch==$torch_version"
}

install() {
    local python
    python=$(find_python) || return
    say "installing into .venv, once (minutes)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv || return
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    install_torch || return
    # the CPU build of torch does not bring Triton along
    [ "$(uname)" != Linux ] || .venv/bin/pip install -qq "triton==$triton_version" || return
    .venv/bin/pip install -qq "setuptools>=70" || return
    .venv/bin/pip install -qq --no-build-isolation -e '.[test]' || return
    fingerprint > .venv/installed
    say "done in $SECONDS s"
}

if [ ! -f .venv/installed ] || [ "$(cat .venv/installed)" != "$(fingerprint)" ]; then
    install || { echo "setup: the installation failed; its own message is above. Repeat the command to go on" >&2; exit 1; }
fi
# shellcheck disable=SC1091
source .venv/bin/activate
