#!/usr/bin/env bash
# Several processes on this machine, one for each GPU; starts them again when they were stopped or died.
#   launch/local.sh [--dry-run] PROCESSES CONFIG.py CONVERTED RUNS [--config.key=value ...]
# Process 0 speaks here, the others in RUNS/process-I.log. SIGTERM and Ctrl-C stop all of them, with a checkpoint.
# PORT: a free one (8476). RESTARTS: how often at most (20). JAX_PLATFORMS: cuda, unless it says otherwise. WEMMU,
# WEMMU_JOIN_TIMEOUT: see stages.sh.
set -euo pipefail

dry=
if [ "${1-}" = --dry-run ]; then
  dry=1
  shift
fi
if [ $# -lt 4 ] || ! [ "$1" -gt 0 ] 2>/dev/null; then
  sed -n '2,6p' "$0" >&2
  exit 2
fi
processes=$1
shift
runs=$3
stages=$(dirname "$0")/stages.sh
coordinator=localhost:${PORT:-8476}
# Or JAX would take the CPU where no GPU is found.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda}

variables() { # of process $1
  echo "JAX_COORDINATOR_ADDRESS=$coordinator" "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$1" \
    "JAX_LOCAL_DEVICE_IDS=$1"
}

if [ -n "$dry" ]; then
  for ((i = 0; i < processes; i++)); do
    echo "# process $i"
    "$stages" --dry-run "$@" | while read -r line; do echo "JAX_PLATFORMS=$JAX_PLATFORMS $(variables "$i") $line"; done
  done
  exit
fi

members=() stopping=
# shellcheck disable=SC2329 # by the trap
stop() { # the whole group of each process
  stopping=1
  for member in "${members[@]}"; do kill -TERM -- "-$member" 2>/dev/null || true; done
}
trap stop TERM INT

# A group of its own for each, so that a signal reaches what it has started.
set -m
mkdir -p "$runs"
for ((attempt = 0; attempt <= ${RESTARTS:-20}; attempt++)); do
  members=()
  for ((i = 0; i < processes; i++)); do
    if [ "$i" -eq 0 ]; then exec 3>&1; else exec 3>>"$runs/process-$i.log"; fi
    # shellcheck disable=SC2046 # a word for each variable
    env $(variables "$i") "$stages" "$@" >&3 2>&1 3>&- &
    members+=("$!")
  done

  # Where one dies, the others end within minutes: JAX notices.
  failed=0
  for member in "${members[@]}"; do
    code=0
    wait "$member" || code=$?
    # A signal to this script ends the wait, and not what was waited for.
    while kill -0 "$member" 2>/dev/null; do
      code=0
      wait "$member" || code=$?
    done
    [ "$failed" -ne 0 ] || failed=$code
    [ "$code" -ne 2 ] || failed=2
  done

  [ "$failed" -ne 0 ] || exit 0
  [ -z "$stopping" ] || exit 75
  # An error that somebody has to mend.
  [ "$failed" -ne 2 ] || exit 2
  echo "local.sh: stopped with $failed; starting again" >&2
done
echo "local.sh: gave up after ${RESTARTS:-20} restarts" >&2
exit "$failed"
