#!/usr/bin/env bash
# One or more machines by the deepspeed launcher and a hostfile with one line for each machine:
#   worker-0 slots=8
#   worker-1 slots=8
# Either once, on the first machine, which starts all of them by pdsh over ssh without password:
#   launch/deepspeed.sh configs/deepspeed/qwen3_30b_a3b_2nodes.yaml [options of lit-moe fit]
# or, where there is no ssh, on each machine with its number (its line in the hostfile, from 0):
#   NODE_RANK=0 launch/deepspeed.sh configs/deepspeed/qwen3_30b_a3b_2nodes.yaml [options]
# which is also how ssh alone does it, without pdsh:
#   for n in 0 1; do
#     ssh "worker-$n" "cd $PWD && NODE_RANK=$n launch/deepspeed.sh CONFIG" &
#   done; wait
#
# What must match on all machines: the code and its packages, the folder that this is started in,
# the config, the paths of model and text, and trainer.default_root_dir, which must be one shared
# folder. All machines need the same number of slots, and this machine must be in the hostfile too.
# ssh: `ssh worker-1 true` must work from here without a question. Its options, if it needs any, are
# in PDSH_SSH_ARGS_APPEND, as in PDSH_SSH_ARGS_APPEND="-i key -p 2222" (then set SSH_CHECK=no: the
# launcher's own trial of ssh does not know them).
# Variables: only those named NCCL_* (on GPUs), PYTHON* and a few more are handed on by ssh. Put
# others, such as GLOO_SOCKET_IFNAME=eth0 (see torchrun.sh), one to a line into ~/.deepspeed_env.
set -euo pipefail
hostfile=${HOSTFILE:-/job/hostfile}         # EDIT: where the hostfile is
devices=${DEVICES:-8}                       # EDIT: the slots of each line in it
export MASTER_ADDR=${MASTER_ADDR:-worker-0} # EDIT: machine 0 as the others see it
config=${1:?usage: [NODE_RANK=N] launch/deepspeed.sh CONFIG [options of lit-moe fit]}
shift
nodes=$(grep --count --no-messages '^[^#]*slots=' "$hostfile" || true)
if ((${nodes:-0} == 0)); then
  echo "hostfile $hostfile names no machine: it must be a file with one line like" \
    "'worker-0 slots=8' for each (another file: HOSTFILE=PATH)" >&2
  exit 2
fi
how=()
if [[ -n ${NODE_RANK:-} ]]; then
  how=(--no_ssh --node_rank "$NODE_RANK")
  unset NODE_RANK # the launcher says the same by CROSS_RANK, and lightning asks only one of them
elif [[ ${SSH_CHECK:-yes} == no ]]; then
  how=(--no_ssh_check)
fi
# --no_local_rank: the launcher would add --local_rank=N to the options of lit-moe.
exec deepspeed --hostfile "$hostfile" --master_addr "$MASTER_ADDR" \
  --master_port "${MASTER_PORT:-29500}" "${how[@]}" --no_local_rank --module \
  lit_moe fit --config "$config" --trainer.num_nodes "$nodes" --trainer.devices "$devices" "$@"
