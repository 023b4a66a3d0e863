#!/usr/bin/env bash
# Checks a GPU on a machine that has JAX, but no network and not all of our libraries. From the root of the repository:
#
#   launch/offline_gpu.sh wheels 3.12    here, with a network: what such a machine lacks, for its Python, into .wheels/ (77 MB)
#   launch/offline_gpu.sh check OUT      there: xcomp_jax.gpu_check, at most 8 minutes; OUT/check.tar.gz has what was found, without traces
#
# Options behind OUT go to the check (--minutes 4, --small). PYTHON chooses the interpreter; the machine is taken to have jax, flax,
# optax, orbax-checkpoint, tokenizers, safetensors, opencv and matplotlib.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

case "${1:-}" in
  wheels)
    options=(--no-deps --only-binary=:all: --python-version "${2:-3.12}" --implementation cp)
    for platform in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
      options+=(--platform "${platform}_x86_64")
    done
    rm -rf .wheels
    "$PYTHON" -m pip download -q -d .wheels "${options[@]}" \
      tokamax==0.0.17 annotated-types av einshape fire immutabledict pydantic pydantic-core qwix==0.1.8 six tensorboardX termcolor \
      typing-inspection xprof
    ls .wheels
    ;;
  check)
    [ $# -ge 2 ] || { echo "error: give a folder for results: launch/offline_gpu.sh check OUT" >&2; exit 1; }
    [ -d .wheels ] || { echo "error: there is no .wheels/; launch/offline_gpu.sh wheels makes it where there is a network" >&2; exit 1; }
    out=$2
    shift 2
    work=$(mktemp -d)
    trap 'tar -czf "$out/check.tar.gz" -C "$work" --exclude profile --exclude world check; rm -rf "$work"' EXIT
    mkdir -p "$out" "$work/check"
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$work/site" .wheels/*.whl
    export PYTHONPATH=$work/site:$PWD PYTHONUNBUFFERED=1
    "$PYTHON" -m xcomp_jax.gpu_check --out "$work/check" "$@"
    ;;
  *)
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
