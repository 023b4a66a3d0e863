#!/usr/bin/env bash
# A TPU VM pod slice, by gcloud: request it, set it up, train, look, take it down. All workers do the same;
# `--config.distributed.coordinator=auto` (the default) lets them find each other.
#
#   launch/tpu_pod.sh create              queue the request, and wait until the slice is there
#   launch/tpu_pod.sh install             clone and install on all workers
#   launch/tpu_pod.sh each COMMAND        on all workers, such as one that brings the data (launch/README.md)
#   launch/tpu_pod.sh train [ARGS]        start training on all workers, in the background; ARGS go to xcomp_jax.train
#   launch/tpu_pod.sh logs                follow worker 0
#   launch/tpu_pod.sh stop                SIGTERM to all workers: the run saves and leaves; `train` goes on
#   launch/tpu_pod.sh delete              give everything back
#
# --dry-run as first argument prints the gcloud commands instead. Settings, all needed but those with a default:
#   NAME ZONE PROJECT TYPE (v5litepod-16, v5p-32, v6e-16, ...) RUNTIME (v2-alpha-tpuv5-lite, ...) REPO (git address)
#   REF (main)  SPOT (0; 1: cheaper, may be preempted)  WORKDIR (gs://bucket/runs/sct: where all workers can write)
#   CONFIG (configs/sct.py; FILE or FILE:VARIANT, as configs/sct.py:7b; or --config=... in ARGS): configs/... is that of REF, which must
#     have it; any other file is copied from here to the workers
#   PYTHON (python3; 3.11 or newer, and some images have 3.10): that of the workers, from which `install` makes .venv. To have one there,
#     launch/tpu_pod.sh each 'sudo add-apt-repository -y ppa:deadsnakes/ppa && sudo apt-get install -y python3.12-venv'
set -euo pipefail

PYTHON=${PYTHON:-python3}
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
action="${1:-}"
shift || true

need NAME ZONE PROJECT TYPE RUNTIME REPO WORKDIR
[[ "$WORKDIR" == gs://* ]] || fail "WORKDIR=$WORKDIR: every worker must reach it; use gs://BUCKET/FOLDER"
REF="${REF:-main}"
SPOT="${SPOT:-0}"

tpu() {
  run gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"
}

everywhere() {
  tpu tpu-vm ssh "$NAME" --worker=all --command="$1"
}

# A worker may have a running one: two on the same chips would both fail, and one without its files.
idle="if kill -0 \$(cat xcomp/train.pid 2> /dev/null) 2> /dev/null; then echo 'already training' >&2; exit 1; fi"

case "$action" in
  create)
    slice=(--node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME")
    [[ $SPOT == 0 ]] || slice+=(--spot)
    tpu queued-resources create "$NAME" "${slice[@]}"
    until [[ $dry != 0 ]]; do
      state=$(gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" --format='value(state.state)')
      echo "$(date +%T) $state"
      case "$state" in
        ACTIVE) break ;;
        FAILED | SUSPENDED) fail "the request is $state; see: gcloud compute tpus queued-resources describe $NAME" ;;
      esac
      sleep 30
    done
    ;;
  install)
    python=$(printf %q "$PYTHON")
    old='"error: xcomp_jax needs Python 3.11 or newer with venv, not " + sys.version.split()[0] + "; nothing is changed. Set PYTHON (see the head of launch/tpu_pod.sh)"'
    new="$python -c 'import importlib.util, sys; sys.version_info >= (3, 11) and importlib.util.find_spec(\"ensurepip\") or sys.exit($old)'"
    clone="rm -rf xcomp; git clone -q $(printf %q "$REPO") xcomp; cd xcomp; git checkout -q $(printf %q "$REF")"
    everywhere "set -e; $idle; $new; $clone; $python -m venv .venv; .venv/bin/pip install -q -e '.[tpu,gcs]'"
    ;;
  each)
    [[ $# == 1 ]] || fail "each needs one argument, the command in quotes"
    everywhere "$1"
    ;;
  train)
    read_options --config.workdir="$WORKDIR" "$@"
    if [[ "$file" != configs/* ]]; then
      tpu tpu-vm scp "$file" "$NAME:xcomp_config.py" --worker=all
      options[0]=--config=../xcomp_config.py$variant
    fi
    start="nohup .venv/bin/python -u -m xcomp_jax.train$(printf ' %q' "${options[@]}") > train.log 2>&1 & echo \$! > train.pid"
    everywhere "set -e; $idle; cd xcomp; $start; sleep 5; tail -n 3 train.log; kill -0 \$(cat train.pid)"
    ;;
  logs)
    tpu tpu-vm ssh "$NAME" --worker=0 --command="tail -n 50 -f xcomp/train.log"
    ;;
  stop)
    everywhere "kill -TERM \$(cat xcomp/train.pid)"
    ;;
  delete)
    tpu queued-resources delete "$NAME" --force --quiet
    ;;
  *)
    fail "what to do? create, install, each, train, logs, stop or delete, not '$action'"
    ;;
esac
