#!/usr/bin/env bash
# One machine: all its devices, as the config says. Usage: launch/local.sh configs/quickstart.yaml [options]
set -euo pipefail
config=${1:?usage: launch/local.sh CONFIG [options of lit-moe fit]}
shift
exec lit-moe fit --config "$config" "$@"
