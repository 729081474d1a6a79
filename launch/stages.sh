#!/usr/bin/env bash
# The four stages one after the other: what each process of a run runs, or the only one.
#   JAX_PLATFORMS=tpu|cuda|cpu launch/stages.sh [--dry-run] CONFIG.py CONVERTED RUNS [--config.key=value ...]
# Goes on where it was stopped. Exits with 75 when it was stopped, and the same command goes on from there; with 2 after
# an error that somebody has to mend. JAX_PLATFORMS: what to run on; without it JAX takes the CPU where no accelerator
# is found. WEMMU: the program, `wemmu` by default; "python -m wemmu_jax" does as well. WEMMU_JOIN_TIMEOUT: seconds
# that all processes of a run may take to come (300).
set -euo pipefail

dry=
if [ "${1-}" = --dry-run ]; then
  dry=1
  shift
fi
if [ $# -lt 3 ] || [ -z "${JAX_PLATFORMS-}" ]; then
  sed -n '2,7p' "$0" >&2
  exit 2
fi
config=$1 init=$2 runs=$3
shift 3
read -ra wemmu <<<"${WEMMU:-wemmu}"

# A shell does not hand a signal on to what it waits for, and what it starts in the background does not see Ctrl-C.
child=
trap '[ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM INT

for stage in stage1 stage2 stage3 stage4; do
  command=("${wemmu[@]}" train --config "$config:$stage" --init "$init" --workdir "$runs/$stage" "$@")
  init=$runs/$stage
  if [ -n "$dry" ]; then
    printf '%q ' "${command[@]}"
    echo
    continue
  fi
  "${command[@]}" &
  child=$!
  code=0
  wait "$child" || code=$?
  # The trap ends a wait; the process has not ended then.
  while kill -0 "$child" 2>/dev/null; do
    code=0
    wait "$child" || code=$?
  done
  child=
  [ "$code" -eq 0 ] || exit "$code"
done
