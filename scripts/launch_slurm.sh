#!/usr/bin/env bash
# Trains on several machines by Slurm. Requeued jobs resume.
#   sbatch --nodes 2 --gpus-per-node 8 scripts/launch_slurm.sh imagenet-xl2 --data.path LATENTS --train.precision bf16
#SBATCH --job-name meanflow
#SBATCH --ntasks-per-node 1
#SBATCH --requeue
#SBATCH --signal B:TERM@120
#SBATCH --output slurm-%j.log
# SIGTERM comes two minutes before the time limit, and at preemption. It is passed on to the processes, which save and
# stop (torchrun gives them 30 s), and the job is queued again.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
# the environment of the other commands, unless another one is active
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
# a wrong option is not worth a restart
python scripts/train.py "$@" --dry-run > /dev/null
srun --kill-on-bad-exit 1 python -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" --max-restarts "${RESTARTS:-10}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:${PORT:-29500}" \
    scripts/train.py "$@" &
job=$!
stopped=
trap 'stopped=1; kill -TERM $job' TERM
code=0
# a trapped signal ends the first wait, not the job
wait $job || { wait $job || code=$?; }
if [ -n "$stopped" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
