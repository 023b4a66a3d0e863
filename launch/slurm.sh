#!/usr/bin/env bash
# GPU nodes under SLURM, a process per node with all of its GPUs:
#
#   sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh --config.workdir=/shared/runs/sct [ARGS]
#   DRY_RUN=1 bash launch/slurm.sh [ARGS]       print what each node would run
#
# ARGS go to xcomp_jax.train; workdir and data must be on storage that all nodes share. Five minutes before the time limit
# SLURM sends SIGTERM: the run saves, and the job queues itself again until training is done.
#SBATCH --job-name=xcomp
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
python="${PYTHON:-.venv/bin/python}"
command=("$python" -u -m xcomp_jax.train --config=configs/sct.py --config.distributed.start_seconds=300 "$@")

if [[ "${DRY_RUN:-0}" != 0 ]]; then
  printf 'srun --label --kill-on-bad-exit=1'
  printf ' %q' "${command[@]}"
  printf '\n'
  exit 0
fi

# JAX takes coordinator, number and process from SLURM's variables.
log=$(mktemp)
srun --label --kill-on-bad-exit=1 "${command[@]}" 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
if [[ $status == 0 ]] && grep -q 'the same command continues' "$log"; then
  scontrol requeue "$SLURM_JOB_ID"
fi
rm -f "$log"
exit "$status"
