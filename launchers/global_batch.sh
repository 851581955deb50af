# shellcheck shell=bash
# What all launchers share; they source it, nobody runs it.

# keep_global_batch STAGE NODES ARGUMENTS...: fewer examples a rank, then fewer ranks, so that the recipe's global batch
# stays, or that of GLOBAL_BATCH. Sets RANKS_PER_NODE and the array `batch`, two more arguments. A batch that cannot be
# had ends the script here, with the numbers (`pemt plan batch --help`).
keep_global_batch() {
    local stage=$1 nodes=$2 found micro accumulation
    shift 2
    found=$("${CONTAINER[@]}" python -m pemt plan batch "$stage" --num_nodes "$nodes" \
        --ranks_per_node "$RANKS_PER_NODE" ${GLOBAL_BATCH:+--global_batch_size "$GLOBAL_BATCH"} "$@")
    read -r RANKS_PER_NODE micro accumulation <<<"$found"
    # shellcheck disable=SC2034  # who sources this uses it
    batch=(--per_device_train_batch_size "$micro" --gradient_accumulation_steps "$accumulation")
}
