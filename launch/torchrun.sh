#!/usr/bin/env bash
# One or more machines by torchrun. Run the same command on each; the three lines below may differ.
# Usage: launch/torchrun.sh configs/one_shot/reap.yaml [options of lit-moe fit]
set -euo pipefail
export MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} # address of the first machine
nodes=${NODES:-1} rank=${NODE_RANK:-0}       # how many machines, and which one this is
devices=${DEVICES:-2}                        # processes on this machine (one per GPU)
config=${1:?usage: launch/torchrun.sh CONFIG [options of lit-moe fit]}
shift
# gloo picks the interface of the host name; on machines where that is 127.0.0.1, name the right one:
#   export GLOO_SOCKET_IFNAME=eth0
exec torchrun --nnodes "$nodes" --node_rank "$rank" --nproc_per_node "$devices" \
  --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" \
  -m lit_moe fit --config "$config" \
  --trainer.num_nodes "$nodes" --trainer.devices "$devices" "$@"
