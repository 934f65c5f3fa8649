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
    (cd "$root" && cat setup.py pyproject.toml scripts/setup.sh $(find csrc -type f ! -name '*.md' | LC_ALL=C sort) && pwd && .venv/bin/python -V) | cksum
}

# a terminal shows pip's own bars, a log one line a part
pip_install() { .venv/bin/pip install --disable-pip-version-check "${quiet[@]}" "$@"; }

# a part of the installation: its number, what it is, and the command
part() {
    local start=$SECONDS
    say "$1/4 $2"
    "${@:3}" || return
    say "$1/4 done in $((SECONDS - start)) s"
}

install_torch() {
    .venv/bin/python -c 'import torch' 2>/dev/null && return
    if [ ! -e /proc/driver/nvidia/version ] && ! command -v nvidia-smi >/dev/null; then
        pip_install "torch==$torch_version+cpu" 2>/dev/null && return
        say "no index offers the CPU build (README, Start, says which does): taking the ordinary one, several GB"
    fi
    pip_install "torch==$torch_version"
}

install() {
    local python quiet=(-qq)
    [ ! -t 1 ] || quiet=()
    python=$(find_python) || return
    say "installing into .venv, once: 3 to 10 minutes, by the network"
    [ -x .venv/bin/python ] || part 1 "a virtual environment of $("$python" -V)" "$python" -m venv .venv || return
    part 2 "torch $torch_version (200 MB for a CPU, several GB for a GPU)" install_torch || return
    # the CPU build of torch does not bring Triton along
    [ "$(uname)" != Linux ] || part 3 "triton $triton_version (200 MB)" pip_install "triton==$triton_version" || return
    part 4 "this package, its native library and what else it needs" install_package || return
    fingerprint > .venv/installed
    say "done in $SECONDS s"
}

install_package() {
    pip_install "setuptools>=70" && pip_install --no-build-isolation -e '.[test,dev]'
}

if [ ! -f .venv/installed ] || [ "$(cat .venv/installed)" != "$(fingerprint)" ]; then
    install || { echo "setup: the installation failed; its own message is above. Repeat the command to go on" >&2; exit 1; }
fi
# shellcheck disable=SC1091
source .venv/bin/activate
