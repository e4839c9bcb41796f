#!/usr/bin/env bash
# One training on one Slurm node: sbatch scripts/slurm.sh experiment=imagenet_volo_d1 seed=1
# Slurm warns two minutes before the time limit; the run saves itself, and the job queues again and goes on.
#SBATCH --job-name=dropkey
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

.venv/bin/torchrun --standalone --nproc-per-node="${SLURM_GPUS_ON_NODE:-8}" train.py "$@" &
job=$!
trap 'kill -TERM "$job"' USR1 TERM # torchrun hands it to every process; each saves and exits with 143
wait "$job"
code=$?
if [ "$code" -gt 128 ]; then # the wait was interrupted by the signal: now wait for the saving
    wait "$job"
    scontrol requeue "${SLURM_JOB_ID:?}"
    exit 0
fi
exit "$code"
