#!/usr/bin/env bash
# Trains on all GPUs of this machine; a process that dies is started again, and the run resumes.
#   bash scripts/launch_node.sh imagenet-xl2 --data.path LATENTS --train.precision bf16
# GPUS=4 takes that many; RESTARTS=10 is how often the job may start again.
set -euo pipefail
cd "$(dirname "$0")/.."
# the environment of the other commands, unless another one is active
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
gpus=${GPUS:-$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)}
if [ "$gpus" -lt 1 ]; then
    echo "launch_node: GPUS: found none, wanted an NVIDIA GPU; set GPUS=N to start N processes all the same" >&2
    exit 2
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
# a wrong option is not worth a restart
python scripts/train.py "$@" --dry-run > /dev/null
exec python -m torch.distributed.run --standalone --nproc-per-node "$gpus" --max-restarts "${RESTARTS:-10}" scripts/train.py "$@"
