#!/usr/bin/env bash
# The four stages one after the other on this machine. Goes on where it was stopped.
#   launch/local.sh CONFIG.py CONVERTED RUNS [--config.key=value ...]
set -euo pipefail

if [ $# -lt 3 ]; then
  sed -n '2,3p' "$0" >&2
  exit 2
fi
config=$1 init=$2 runs=$3
shift 3
for stage in stage1 stage2 stage3 stage4; do
  wemmu train --config "$config:$stage" --init "$init" --workdir "$runs/$stage" "$@"
  init=$runs/$stage
done
