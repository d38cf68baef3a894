#!/usr/bin/env bash
# sbatch tools/train_slurm.sh {classification|detection|segmentation} CONFIG [arguments of train.py]
# Trains on two nodes with four GPUs each. The same command, or SLURM's requeue, resumes the run.
# SLURM sends SIGTERM two minutes before the time limit; classification then saves and stops.
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
    -m "$1.train" "${@:2}" --resume auto
