#!/usr/bin/env bash
# GPU nodes under SLURM, a process per GPU:
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sh --config.workdir=/shared/runs/sct [ARGS]
#   DRY_RUN=1 bash launch/slurm.sh [ARGS]       print what would be run
#
# A process per GPU, since every process reads its own devices' rows with config.data.threads readers, each of which makes a
# whole micro-batch, row after row: one process with 8 GPUs has a reader for 8 rows where 8 processes have 8, and one
# interpreter's lock for all. The rows that wait in memory are as many either way. Where config.mesh.context or tensor is above
# 1, processes that share a row read it each; if that is the bottleneck, --ntasks-per-node=1 --cpus-per-task=64 is a process
# per node with all of its GPUs.
#
# ARGS go to xcomp_jax.train; workdir and data must be on storage that all nodes share. Five minutes before the time limit
# SLURM sends SIGTERM: the run saves, and the job queues itself again until training is done.
#SBATCH --job-name=xcomp
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
python="${PYTHON:-.venv/bin/python}"
command=("$python" -u -m xcomp_jax.train --config=configs/sct.py --config.distributed.start_seconds=300 "$@")
# JAX takes coordinator, number and process from SLURM's variables, hosts.py the GPUs. CPUs are said again: since SLURM 22.05
# srun does not take them over, and all readers of a process would share one.
command=(srun --label --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" "${command[@]}")

if [[ "${DRY_RUN:-0}" != 0 ]]; then
  printf '%q ' "${command[@]}"
  printf '\n'
  exit 0
fi

log=$(mktemp)
"${command[@]}" 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
if [[ $status == 0 ]] && grep -q 'the same command continues' "$log"; then
  scontrol requeue "$SLURM_JOB_ID"
fi
rm -f "$log"
exit "$status"
