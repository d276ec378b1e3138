#!/usr/bin/env bash
# Workers of a pool (docs/operations.md, "Many machines") as jobs of SLURM:
#
#   sbatch --array=1-8 infra/slurm/worker.sh
#
# Each job is one worker in its own clone of ORIGIN below SCRATCH, and takes stages until it is drained or its time is over; a stage
# that was at work then goes on from its checkpoint on a different worker. SETUP prepares the packages of a clone, once.
#SBATCH --job-name=posttrain-worker
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --signal=B:TERM@120
set -euo pipefail

: "${PREFECT_API_URL:?the address of the Prefect server, which this host must reach}"
pool=${POSTTRAIN_POOL:-stages}
origin=${ORIGIN:-$(git -C "$SLURM_SUBMIT_DIR" remote get-url origin)}
name=slurm-$SLURM_JOB_ID
clone=${SCRATCH:-/tmp}/posttrain-$name

git clone --quiet "$origin" "$clone"
cd "$clone"
cp "$SLURM_SUBMIT_DIR/.dvc/config.local" .dvc/ 2>/dev/null || true   # the remote's settings, if they are not committed
${SETUP:-make setup}
# exec: SLURM's signal reaches the worker itself
exec .venv/bin/python -m flows.workers add "$pool" --name "$name"
