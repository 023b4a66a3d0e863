#!/usr/bin/env bash
# GPU nodes under SLURM, a process per GPU:
#
#   launch/slurm.sh [--dry-run] [OPTIONS --] [ARGS]      OPTIONS go to sbatch, ARGS to xcomp_jax.train
#   launch/slurm.sh --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 -- --config.workdir=/shared/runs/sct
#
# It reads ARGS and queues itself; --dry-run prints what would be run. `sbatch OPTIONS launch/slurm.sh ARGS` goes as well, but finds what
# is wrong with ARGS only when its turn has come. Settings, which sbatch hands on:
#   CONFIG (configs/sct.py; FILE or FILE:VARIANT, as configs/sct.py:7b; or --config=... in ARGS): on storage that the nodes share
#   PYTHON (.venv/bin/python; 3.11 or newer): that of the nodes
#
# A process per GPU, since every process reads its own devices' rows with config.data.threads readers, each of which makes a
# whole micro-batch, row after row: one process with 8 GPUs has a reader for 8 rows where 8 processes have 8, and one
# interpreter's lock for all. The rows that wait in memory are as many either way. Where config.mesh.context or tensor is above
# 1, processes that share a row read it each; if that is the bottleneck, --ntasks-per-node=1 --cpus-per-task=64 is a process
# per node with all of its GPUs.
#
# Workdir and data must be on storage that all nodes share. Five minutes before the time limit
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

PYTHON=${PYTHON:-.venv/bin/python}
dry=0
if [[ -e $(dirname "$0")/common.sh ]]; then # not the copy that SLURM makes of a job's script
  # shellcheck source=launch/common.sh
  source "$(dirname "$0")/common.sh"
  queue=(sbatch)
  for argument; do
    if [[ "$argument" == -- ]]; then
      while [[ "$1" != -- ]]; do
        queue+=("$1")
        shift
      done
      shift
      break
    fi
  done
  read_options "$@"
  set -- "${options[@]}"
  if [[ -z "${SLURM_JOB_ID:-}" ]]; then
    run "${queue[@]}" "$0" "$@" || exit
    [[ $dry != 0 ]] || exit 0
  fi
else
  cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
  [[ "${1:-}" == --config=* ]] || set -- --config="${CONFIG:-configs/sct.py}" "$@"
fi

command=("$PYTHON" -u -m xcomp_jax.train "$1" --config.distributed.start_seconds=300 "${@:2}")
# JAX takes coordinator, number and process from SLURM's variables, hosts.py the GPUs. CPUs are said again: since SLURM 22.05
# srun does not take them over, and all readers of a process would share one.
command=(srun --label --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" "${command[@]}")

printf '+'
printf ' %q' "${command[@]}"
printf '\n'
[[ $dry == 0 ]] || exit 0

log=$(mktemp)
"${command[@]}" 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
if [[ $status == 0 ]] && grep -q 'the same command continues' "$log"; then
  scontrol requeue "$SLURM_JOB_ID"
fi
rm -f "$log"
exit "$status"
