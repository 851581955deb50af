#!/usr/bin/env bash
# Any `pemt` command on N machines without SLURM: start the same line on every one of them, in any order.
# They find each other at a rendezvous; nobody needs a rank or ssh. A machine that fails makes all start
# anew, at most MAX_RESTARTS times, from the newest checkpoint.
#
#   NUM_NODES=4 RENDEZVOUS=node1:29500 launchers/torchrun.sh adapt --config adapt --task_name superglue-cb \
#       --output_dir /shared/runs/cb --bank_dir /shared/bank
#
# Variables, each with its default; set them before the call:
#   NUM_NODES        machines (1)
#   RENDEZVOUS       host:port of one of them, the same on all (localhost:0, for one machine)
#   RUN_ID           tells this job from others at the same rendezvous (pemt)
#   RANKS_PER_NODE   ranks on each machine (the number of GPUs; 2 without one)
#   GLOBAL_BATCH     examples of an optimizer step on all ranks together (the recipe's, whatever the number of ranks)
#   DEEPSPEED_JSON   DeepSpeed's file, which chooses the ZeRO stage (ds_configs/zero2.json)
#   MAX_RESTARTS     how often to start anew (3)
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT  seconds that a step and a save may take after SIGTERM, before SIGKILL (240)
#
# `launchers/torchrun.sh --dry_run adapt ...` prints what would start.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launchers/global_batch.sh
source launchers/global_batch.sh
CONTAINER=() batch=()

NUM_NODES=${NUM_NODES:-1}
RENDEZVOUS=${RENDEZVOUS:-localhost:0}
RUN_ID=${RUN_ID:-pemt}
DEEPSPEED_JSON=${DEEPSPEED_JSON:-ds_configs/zero2.json}
MAX_RESTARTS=${MAX_RESTARTS:-3}

gpus=0
if command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi --list-gpus | grep -c '^GPU' || true)
fi
RANKS_PER_NODE=${RANKS_PER_NODE:-$((gpus > 0 ? gpus : 2))}

dry_run=0
if [[ ${1:-} == --dry_run ]]; then
    dry_run=1
    shift
fi
: "${1:?a pemt command, such as adapt, and its arguments}"

if [[ $1 == adapt || $1 == source ]]; then
    keep_global_batch "$1" "${NUM_NODES##*:}" "${@:2}" # of 1:4 machines, with all four there
fi

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}
# What `accelerate launch` would tell the ranks. And a new store for every start: machines count restarts each
# for itself, and would look for each other's ranks in the old one at different places.
settings=(ACCELERATE_USE_DEEPSPEED=true "ACCELERATE_DEEPSPEED_CONFIG_FILE=$DEEPSPEED_JSON"
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1)
command=(env "${settings[@]}" torchrun --nnodes "$NUM_NODES" --nproc_per_node "$RANKS_PER_NODE"
    --rdzv_backend c10d --rdzv_endpoint "$RENDEZVOUS" --rdzv_id "$RUN_ID" --max_restarts "$MAX_RESTARTS"
    -m pemt "$@" "${batch[@]}" --resume_from_checkpoint true)
if ((dry_run)); then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
exec "${command[@]}"
