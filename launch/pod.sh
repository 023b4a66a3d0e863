#!/bin/sh
# A command, with exit code 75 instead of 0 if it was stopped by a signal and would go on (what training says last then):
#
#   sh launch/pod.sh python -u -m xcomp_jax.train ARGS
#
# To Kubernetes exit code 0 means done, also of a pod that it has just evicted: the job would be complete, and never start
# again. POSIX: an image need not have bash.
said=/tmp/said.$$ log=/tmp/log.$$
mkfifo "$said" || exit 1
tee "$log" < "$said" &
copy=$!
run='' told=''
trap 'told=1; [ -z "$run" ] || kill -TERM "$run"' TERM # Kubernetes tells this shell only, perhaps before there is a run
"$@" > "$said" 2>&1 &
run=$!
[ -z "$told" ] || kill -TERM "$run"

# A signal in the last moment may make it 143 of a run that is done: started again, that has nothing left to do.
wait "$run"
status=$?
while kill -0 "$run" 2> /dev/null; do # it was the signal that ended the wait
  wait "$run"
  status=$?
done
wait "$copy"
if [ "$status" = 0 ] && grep -q 'the same command continues' "$log"; then
  status=75
fi
rm -f "$said" "$log"
exit "$status"
