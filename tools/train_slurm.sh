#!/usr/bin/env bash
# sbatch tools/train_slurm.sh {classification|detection|segmentation} CONFIG [more arguments of its train.py]
# Two machines with four GPUs each. The same command, or SLURM's requeue, continues a run that was
# stopped. Two minutes before the time limit classification saves and stops by itself.
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
