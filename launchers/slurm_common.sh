# shellcheck shell=bash
# What both SLURM scripts share; they source it, nobody runs it.
#
# A job that SLURM is about to stop (time limit, preemption) gets SIGUSR1 or SIGTERM in its batch script.
# Passed on as SIGTERM it reaches the ranks; the run saves a checkpoint and writes `interrupted` into
# OUTPUT_DIR/status.json. Then the job puts itself back into the queue, and the same command resumes.
# (Torch's launcher exits with 1 whatever its ranks gave, so the file decides, and not the exit status.) A job
# that was told to stop and got no further than that, because it had not begun or was killed while it
# saved, goes back into the queue too; one that failed does not.

# How long torch's launcher waits for a step and a save to end, after SIGTERM, before it kills (its own: 30 s).
# Less than the 300 s of warning that the scripts ask SLURM for.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}

# announce COMMAND...: print it as one line that a shell would take.
announce() {
    printf '%q ' "$@"
    echo
}

# state_since OUTPUT_DIR FILE: what status.json says, if it is newer than the file.
state_since() {
    if [[ $1/status.json -nt $2 ]]; then
        sed -n 's/.*"state": "\([a-z]*\)".*/\1/p' "$1/status.json"
    fi
}

# run_and_requeue OUTPUT_DIR COMMAND...: run it; requeue this job if the run was interrupted.
run_and_requeue() {
    local output_dir=$1 child started state told=0 status=0
    shift
    started=$(mktemp)
    "$@" &
    child=$!
    # shellcheck disable=SC2064  # the child's id is known now and will not change
    trap "told=1; echo \"$JOB_NAME: told to stop, passing it on\"; kill -TERM $child 2>/dev/null || true" USR1 TERM
    wait "$child" || status=$?
    # A trapped signal ends `wait` early, with the child still saving its checkpoint.
    while kill -0 "$child" 2>/dev/null; do
        status=0
        wait "$child" || status=$?
    done
    trap - USR1 TERM
    # A file from before would send a run that cannot start round and round.
    state=$(state_since "$output_dir" "$started")
    rm -f "$started"
    if ((status != 0)) && [[ $state == interrupted || ($told == 1 && $state =~ ^(running)?$) ]]; then
        echo "$JOB_NAME: ${state:-stopped before it began}, back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
        status=0
    fi
    return "$status"
}
