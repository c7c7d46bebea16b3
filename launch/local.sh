#!/usr/bin/env bash
# One machine. Lightning itself starts one process for each device that the config asks for.
#   launch/local.sh configs/quickstart.yaml [options of lit-moe fit]
set -euo pipefail
config=${1:?usage: launch/local.sh CONFIG [options of lit-moe fit]}
shift
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # threads of each process
exec python -m lit_moe fit --config "$config" "$@"
