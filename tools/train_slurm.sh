#!/usr/bin/env bash
# sbatch tools/train_slurm.sh CONFIG.yaml [key=value ...]
# Two machines with four GPUs each. Two minutes before the time limit the run saves and stops; the same
# command, or SLURM's requeue, continues it.
#SBATCH --job-name=flash_internimage
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=40
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun .venv/bin/torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 4 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
    -m classification.train "$@" --resume auto
