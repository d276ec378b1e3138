#!/usr/bin/env bash
# Run one training stage over the hosts of a SLURM job:
#
#   sbatch --nodes 2 infra/slurm/stage.sh align@grpo-0
#
# WORKSPACE is this project's clone on each host; the hosts need no shared disk. A job that lost a host is queued again, and continues from
# rank 0's checkpoint; keep that on a disk that outlives the job.
#SBATCH --job-name=posttrain
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=16
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --kill-on-bad-exit=1
set -euo pipefail

stage=${1:?the name of a stage, such as align@grpo-0}
config=${CONFIG:-infra/accelerate/fsdp2_gpu.yaml}
workspace=${WORKSPACE:-$SLURM_SUBMIT_DIR}
address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# single quotes: each host puts in its own rank
# shellcheck disable=SC2016
exec srun --kill-on-bad-exit=1 --chdir="$workspace" bash -c \
    'exec .venv/bin/python -m flows.node "$1" --rank "$SLURM_NODEID" --hosts "$SLURM_NNODES" --address "$2" --config "$3"' \
    stage "$stage" "$address" "$config"
