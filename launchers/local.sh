#!/usr/bin/env bash
# Both stages on one machine: an expert for every source task, then the target task over all of them.
#
# Variables, each with its default; set them before the call:
#   SOURCE_TASKS     source tasks, separated by spaces (required)
#   TARGET_TASK      the task to adapt to (required)
#   MODEL            base model, a hub id or a folder (the recipes' own)
#   BANK_DIR         where the experts are kept; those already there are not trained again (bank)
#   OUTPUT_DIR       runs go to OUTPUT_DIR/<stage>-<task> (runs)
#   NUM_RANKS        ranks to start (the number of GPUs; 2 without one)
#   GLOBAL_BATCH     examples of an optimizer step on all ranks together (each recipe's, whatever the number of ranks)
#   ACCELERATE_YAML  accelerate's file (launchers/accelerate/one_node.yaml; cpu.yaml without a GPU)
#   DEEPSPEED_JSON   DeepSpeed's file, which chooses the ZeRO stage (ds_configs/zero2.json)
#
# `launchers/local.sh --dry_run` prints what would start; other arguments go to both stages as they are:
#   SOURCE_TASKS="mnli qnli" TARGET_TASK=superglue-cb launchers/local.sh --seed 1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launchers/global_batch.sh
source launchers/global_batch.sh
CONTAINER=()

: "${SOURCE_TASKS:?names the source tasks, separated by spaces}"
: "${TARGET_TASK:?names the target task}"
BANK_DIR=${BANK_DIR:-bank}
OUTPUT_DIR=${OUTPUT_DIR:-runs}
DEEPSPEED_JSON=${DEEPSPEED_JSON:-ds_configs/zero2.json}

dry_run=0
if [[ ${1:-} == --dry_run ]]; then
    dry_run=1
    shift
fi
gpus=0
if command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi --list-gpus | grep -c '^GPU' || true)
fi
if ((gpus > 0)); then
    ACCELERATE_YAML=${ACCELERATE_YAML:-launchers/accelerate/one_node.yaml}
    NUM_RANKS=${NUM_RANKS:-$gpus}
else
    ACCELERATE_YAML=${ACCELERATE_YAML:-launchers/accelerate/cpu.yaml}
    NUM_RANKS=${NUM_RANKS:-2}
fi

model=()
if [[ -n ${MODEL:-} ]]; then
    model=(--model_name_or_path "$MODEL")
fi

# pemt_launch STAGE ARGUMENTS...
pemt_launch() {
    RANKS_PER_NODE=$NUM_RANKS
    keep_global_batch "$1" 1 "${@:2}"
    local command=(accelerate launch --config_file "$ACCELERATE_YAML" --deepspeed_config_file "$DEEPSPEED_JSON"
        --num_processes "$RANKS_PER_NODE" -m pemt "$@" "${batch[@]}")
    if ((dry_run)); then
        printf '%q ' "${command[@]}"
        echo
    else
        "${command[@]}"
    fi
}

read -ra tasks <<<"$SOURCE_TASKS"
for task in "${tasks[@]}"; do
    if [[ -e $BANK_DIR/$task/manifest.json ]]; then
        echo "local.sh: $BANK_DIR/$task is there already"
        continue
    fi
    pemt_launch source --config source --task_name "$task" --bank_dir "$BANK_DIR" \
        --output_dir "$OUTPUT_DIR/source-$task" "${model[@]}" "$@"
done

sources=$(IFS=, && echo "${tasks[*]}")
pemt_launch adapt --config adapt --task_name "$TARGET_TASK" --bank_dir "$BANK_DIR" \
    --source_tasks "[$sources]" --output_dir "$OUTPUT_DIR/adapt-$TARGET_TASK" "${model[@]}" "$@"
