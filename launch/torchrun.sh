#!/usr/bin/env bash
# One or more machines by torchrun. Edit the three lines, then run on each machine, all within some
# minutes, the same command with its own number (the first machine is 0):
#   NODE_RANK=0 launch/torchrun.sh configs/deepspeed/qwen3_30b_a3b_2nodes.yaml [options]
#
# What must match on all machines: the code and its packages, the config, the paths of model and
# text, and trainer.default_root_dir, which must be one shared folder (each rank writes its shard
# of a checkpoint, rank 0 the export). Port 29500 of the first machine must be open to the others.
set -euo pipefail
nodes=${NODES:-1}                            # EDIT: machines
devices=${DEVICES:-2}                        # EDIT: processes on each, one per GPU
export MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} # EDIT: machine 0 as the others see it
# Where the host name of a machine means 127.0.0.1 the others cannot reach it; name the interface
# that they share (`ip -brief address` lists them), for CPU and for GPU:
#   export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0
config=${1:?usage: NODE_RANK=N launch/torchrun.sh CONFIG [options of lit-moe fit]}
shift
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # threads of each process
exec torchrun --nnodes "$nodes" --node_rank "${NODE_RANK:-0}" --nproc_per_node "$devices" \
  --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" \
  -m lit_moe fit --config "$config" --trainer.num_nodes "$nodes" --trainer.devices "$devices" "$@"
