# shellcheck shell=bash disable=SC2034 # what is set here is used by those who source it
# What the launchers share; they source it. The same in all of them:
#
#   --dry-run  as first argument (or DRY_RUN=1): print what would be run
#   CONFIG     FILE[:VARIANT] (configs/sct.py): of the run; a --config among ARGS is taken instead
#   PYTHON     the Python that trains, 3.11 or newer, by its name or path there
#
# ARGS are read here as training will read them, if a Python here can (launch/check.py), before anything is asked for.

fail() {
  echo "error: $1" >&2
  exit 1
}

dry=${DRY_RUN:-0}
if [[ "${1:-}" == --dry-run ]]; then
  dry=1
  shift
fi

# A command is shown, and run unless it is a dry run.
run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  [[ $dry != 0 ]] || "$@"
}

need() {
  local setting
  for setting; do
    [[ -n "${!setting:-}" ]] || fail "set $setting (see the head of launch/$(basename "$0"))"
  done
}

# From training's options: `file` and `variant` (such as :7b) of the config, and `options`, of which the first is --config.
read_options() {
  local reader status config=${CONFIG:-configs/sct.py}
  options=(--config=)
  while [[ $# -gt 0 ]]; do
    case "$1" in
      --config=* | -config=*) config=${1#*=} ;;
      --config | -config)
        [[ $# -gt 1 ]] || fail "$1 needs a file"
        config=$2
        shift
        ;;
      *) options+=("$1") ;;
    esac
    shift
  done
  file=${config%%:*}
  variant=${config#"$file"}
  file=${file/#\~\//${HOME:-}/}
  options[0]=--config=$file$variant
  [[ -f "$file" ]] || fail "no config file $file in $PWD; CONFIG or --config is FILE[:VARIANT], configs/... from the root of the repository"
  for reader in .venv/bin/python "$PYTHON" python3; do
    "$reader" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || continue # not here, or old
    status=0
    "$reader" "$(dirname "${BASH_SOURCE[0]}")/check.py" "${options[@]}" || status=$?
    [[ $status != 0 ]] || return 0
    [[ $status == 3 ]] || exit 1
  done
  echo "note: no Python here can read the config (that takes 3.11, absl-py and ml_collections); its mistakes will show when training starts" >&2
}
