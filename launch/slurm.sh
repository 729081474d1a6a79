#!/usr/bin/env bash
#SBATCH --job-name=wemmu
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# GPU nodes, a process for each GPU; queued again when its time is over, when it is preempted and when it died.
#   sbatch launch/slurm.sh CONFIG.py CONVERTED RUNS [--config.key=value ...]
#   launch/slurm.sh --dry-run CONFIG.py CONVERTED RUNS [...]
# sbatch's own flags overrule the lines above. RESTARTS: how often at most (20). WEMMU, WEMMU_JOIN_TIMEOUT: see
# stages.sh.
set -euo pipefail

dry=
if [ "${1-}" = --dry-run ]; then
  dry=1
  shift
fi
if [ $# -lt 3 ]; then
  sed -n '11,15p' "$0" >&2
  exit 2
fi
# Where sbatch was called: Slurm runs a copy of this file.
stages=${SLURM_SUBMIT_DIR:-.}/launch/stages.sh
command=(srun --kill-on-bad-exit=1 "$stages" "$@")
export JAX_PLATFORMS=cuda

if [ -n "$dry" ]; then
  grep '^#SBATCH' "$0"
  printf '%q ' JAX_PLATFORMS=cuda "${command[@]}"
  echo
  "$(dirname "$0")/stages.sh" --dry-run "$@"
  exit
fi

trap : TERM # srun hands it on; this shell sees the end of it
said=$(mktemp)
code=0
{ "${command[@]}" 2>&1 >&3 | (trap '' TERM && exec tee "$said" >&2); } 3>&1 || code=$?
# 2: an error that somebody has to mend. srun's own code is the highest of all, and who waited for the one that
# failed is killed.
! grep -q '^srun: error: .*: Exited with exit code 2$' "$said" || code=2
rm -f "$said"
if [ "$code" -ne 0 ] && [ "$code" -ne 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${RESTARTS:-20}" ]; then
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
