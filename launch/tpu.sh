#!/usr/bin/env bash
# TPU VMs by a queued resource, a process on each host; asks for others when they were preempted. Runs where gcloud is.
#   NAME=wemmu ZONE=us-east5-a TYPE=v5p-256 SETUP=... launch/tpu.sh [--dry-run] CONFIG.py CONVERTED RUNS [--config...]
# TYPE: v5p-256 is 128 chips, v6e-256 is 256. SETUP: commands that make a new VM ready and end in this repository, see
# README.md. SLICES: more than one are joined over the data-centre network (1). SPOT=1: cheaper, and preempted.
# RUNTIME: the VM's image, by TYPE if not given. RESTARTS: how often at most (50). POLL: seconds between looks (60).
# WEMMU_JOIN_TIMEOUT: seconds that all hosts may take to come, SETUP done (1800).
set -euo pipefail

dry=
if [ "${1-}" = --dry-run ]; then
  dry=1
  shift
fi
if [ $# -lt 3 ] || [ -z "${NAME-}" ] || [ -z "${ZONE-}" ] || [ -z "${TYPE-}" ] || [ -z "${SETUP-}" ]; then
  sed -n '2,7p' "$0" >&2
  exit 2
fi
case $TYPE in
  v4-*) runtime=tpu-ubuntu2204-base ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *)
    echo "tpu.sh: TYPE=$TYPE; expected v4-N, v5p-N, v5litepod-N or v6e-N (a tpu7x is to be had by gke.sh)" >&2
    exit 2
    ;;
esac

resources=(gcloud compute tpus queued-resources)
if [ "${SLICES:-1}" -gt 1 ]; then
  nodes=("--node-count=$SLICES" "--node-prefix=$NAME")
else
  nodes=("--node-id=$NAME")
fi
create=("${resources[@]}" create "$NAME" "--zone=$ZONE" "--accelerator-type=$TYPE"
  "--runtime-version=${RUNTIME:-$runtime}" "${nodes[@]}")
[ -z "${SPOT-}" ] || create+=(--spot)
describe=("${resources[@]}" describe "$NAME" "--zone=$ZONE" "--format=value(state.state)")
delete=("${resources[@]}" delete "$NAME" "--zone=$ZONE" --force --quiet)
# The lock: where the connection broke, the processes of before may take a while to end. The last line: gcloud's own
# exit code does not tell what became of a command on several hosts.
variables="JAX_PLATFORMS=tpu WEMMU_JOIN_TIMEOUT=${WEMMU_JOIN_TIMEOUT:-1800}"
remote="$SETUP && { $variables flock -w 900 /tmp/wemmu.lock launch/stages.sh $(printf '%q ' "$@");"
remote+=' echo "wemmu ended with $?"; }'
train=("${resources[@]}" ssh "$NAME" "--zone=$ZONE" --node=all --worker=all --batch-size=all "--command=$remote")

if [ -n "$dry" ]; then
  for command in create describe train delete; do
    declare -n words=$command
    printf '%q ' "${words[@]}"
    echo
  done
  exit
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT

answered= # whether gcloud works here at all
ready() { # asks for the resource until it is there
  local state refused=0 failed=0
  while true; do
    if state=$("${describe[@]}" 2>"$log"); then
      answered=1
      case $state in
        ACTIVE) return ;;
        SUSPENDED) ! "${delete[@]}" || continue ;; # preempted
        FAILED)
          failed=$((failed + 1))
          if [ "$failed" -eq 5 ]; then
            "${describe[@]/(state.state)/(state)}" >&2 || true
            echo "tpu.sh: gave up; $NAME failed five times and is still there" >&2
            exit 1
          fi
          "${delete[@]}" || true
          ;;
        *) ;; # waiting for resources, being made, being taken away
      esac
    elif grep -q NOT_FOUND "$log"; then
      answered=1
      ! "${create[@]}" || continue
      # It may have been made all the same.
      refused=$((refused + 1))
      if [ "$refused" -eq 5 ]; then
        echo "tpu.sh: gave up; $NAME cannot be made" >&2
        exit 1
      fi
    else # the network, or a login that is over: the VMs may be there
      cat "$log" >&2
      [ -n "$answered" ] || exit 1
      echo "tpu.sh: no word of $NAME; asking again" >&2
    fi
    sleep "${POLL:-60}"
  done
}

for ((attempt = 0; attempt <= ${RESTARTS:-50}; attempt++)); do
  ready
  "${train[@]}" 2>&1 | tee "$log" || true
  ends=$(sed -n 's/.*wemmu ended with \([0-9]*\)$/\1/p' "$log" | sort -u | tr '\n' ' ')
  case " $ends" in
    " 0 ")
      for _ in 1 2 3 4 5; do
        if "${delete[@]}" 2>"$log" || grep -q NOT_FOUND "$log"; then exit 0; fi
        cat "$log" >&2
        sleep "${POLL:-60}"
      done
      echo "tpu.sh: done; $NAME cannot be deleted and is still there" >&2
      exit 1
      ;;
    *" 2 "*)
      echo "tpu.sh: an error that somebody has to mend; $NAME is still there" >&2
      exit 2
      ;;
  esac
  echo "tpu.sh: stopped (${ends:-no word from the hosts}); going on" >&2
  sleep "${POLL:-60}"
done
echo "tpu.sh: gave up; $NAME is still there" >&2
exit 1
