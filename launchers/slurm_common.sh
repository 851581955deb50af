# shellcheck shell=bash
# What both SLURM scripts share; they source it, nobody runs it.
#
# A job that SLURM is about to stop (time limit, preemption) gets SIGUSR1 or SIGTERM in its batch script.
# Passed on as SIGTERM it reaches the ranks; the run saves a checkpoint and writes `interrupted` into
# OUTPUT_DIR/status.json. Then the job puts itself back into the queue, and the same command goes on.
# (Torch's launcher exits with 1 whatever its ranks gave, so the file decides, and not the exit status.)

# announce COMMAND...: print it as one line that a shell would take.
announce() {
    printf '%q ' "$@"
    echo
}

# run_and_requeue OUTPUT_DIR COMMAND...: run it; requeue this job if the run was interrupted.
run_and_requeue() {
    local output_dir=$1 child started status=0
    shift
    started=$(mktemp)
    "$@" &
    child=$!
    # shellcheck disable=SC2064  # the child's id is known now and will not change
    trap "echo \"$JOB_NAME: told to stop, passing it on\"; kill -TERM $child 2>/dev/null || true" USR1 TERM
    wait "$child" || status=$?
    # A trapped signal ends `wait` early, with the child still saving its checkpoint.
    while kill -0 "$child" 2>/dev/null; do
        status=0
        wait "$child" || status=$?
    done
    trap - USR1 TERM
    # A file from before would send a run that cannot start round and round.
    if ((status != 0)) && [[ $output_dir/status.json -nt $started ]] &&
        grep -q '"interrupted"' "$output_dir/status.json"; then
        echo "$JOB_NAME: interrupted and saved, back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
        status=0
    fi
    rm -f "$started"
    return "$status"
}
