#!/usr/bin/env bash
# One run on several nodes under SLURM: torchrun on each node, joined by its c10d rendezvous on the first one.
# Usage: sbatch --nodes 2 slurm.sh --config run.yaml --output_dir /shared/runs/first [further options of espalier train]
# The run file, the rows and the output folder must lie on a file system that all nodes see.
#SBATCH --job-name=espalier
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

# A process a GPU; on nodes without GPUs set PROCESSES_PER_NODE (1 is a good choice).
processes=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first_node=${nodes%%$'\n'*} # not `| head -n 1`: with pipefail, scontrol may die of the closed pipe, and the job with it
# A port of the job's own, so that two jobs on one node do not meet.
port=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-1} / processes > 0 ? ${SLURM_CPUS_PER_TASK:-1} / processes : 1))}

# SIGTERM (SLURM sends it 120 s before the time limit) saves a checkpoint. A job that SLURM starts again goes on from it.
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
  set -- "$@" --resume_from_checkpoint last
fi

exec srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" \
  --nproc_per_node "$processes" \
  --rdzv_id "$SLURM_JOB_ID" \
  --rdzv_backend c10d \
  --rdzv_endpoint "$first_node:$port" \
  --max_restarts "${MAX_RESTARTS:-0}" \
  -m espalier train "$@"
