# shellcheck shell=bash
# What the SLURM scripts share; they source it, nobody runs it.
#
# Variables of all SLURM scripts, each with its default; set them before the call:
#   NODES            nodes to ask for (the script's own #SBATCH line)
#   RANKS_PER_NODE   ranks on each node, one a GPU (the GPUs that SLURM gave the job; 8 before it has one)
#   CPUS_PER_RANK    cores of each rank: asked for as --cpus-per-task, and shared out as OMP_NUM_THREADS (8)
#   GPU_OPTION       how this cluster is asked for GPUs, such as --gres=gpu:a100:8; `none` asks for no GPU
#                    (--gpus-per-node=RANKS_PER_NODE)
#   LOG_DIR          folder for what the jobs print, as NAME-JOBID.out; made before SLURM needs it (OUTPUT_DIR/slurm)
#   HOOK             bash file that is sourced on every node before anything is started: modules, a virtual
#                    environment, exported variables; `CONTAINER=(apptainer exec --nv pemt.sif)` in it runs all
#                    of pemt in a container (none)
#   LAUNCHER         `accelerate`: one `accelerate launch` a node; `srun`: one task a rank and no launcher (accelerate)
#   GLOBAL_BATCH     examples of an optimizer step on all ranks together (the recipe's, whatever the number of ranks)
#   OFFLINE_DIR      folder that `pemt fetch --to` has filled: becomes HF_HOME, and no node asks the network (none)
#   STAGE_DIR        folder on each node's own disk, such as /local/scratch/$USER: OFFLINE_DIR, and a base model or
#                    data that are given as folders, are copied there first, and read from there (none)
#   MODEL            base model, a hub id or a folder that every node sees (the recipe's own)
#   BANK_DIR         the experts, on a disk that every node sees (bank)
#   OUTPUT_DIR       the runs go to OUTPUT_DIR/<stage>-<task>, on such a disk too (runs)
#   DEEPSPEED_JSON   DeepSpeed's file, which chooses the ZeRO stage (ds_configs/zero2.json)
#   MASTER_PORT      a port that is free on the first node (drawn from the job's id)
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT  seconds for a step and a save, after SIGTERM, before torch's launcher kills (240)
#
# What else is exported reaches every rank; which of NCCL_*, GLOO_*, HF_* and the like are set, the job's first lines
# tell. SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT and their like are read by sbatch itself.
#
# A job that SLURM is about to stop (time limit, preemption) gets SIGUSR1 or SIGTERM in its batch script.
# Passed on as SIGTERM it reaches the ranks; the run saves a checkpoint and writes `interrupted` into
# OUTPUT_DIR/status.json. Then the job puts itself back into the queue, and the same command resumes.
# (Torch's launcher exits with 1 whatever its ranks gave, so the file decides, and not the exit status.) A job
# that was told to stop and got no further than that, because it had not begun or was killed while it
# saved, goes back into the queue too; one that failed does not.

# Torch's own 30 s are too few. Less than the 300 s of warning that the scripts ask SLURM for.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}
# Where sbatch was told --export=NONE, srun would hand the ranks nothing of what is exported here.
export SLURM_EXPORT_ENV=ALL

BANK_DIR=${BANK_DIR:-bank}
OUTPUT_DIR=${OUTPUT_DIR:-runs}
DEEPSPEED_JSON=${DEEPSPEED_JSON:-ds_configs/zero2.json}
LAUNCHER=${LAUNCHER:-accelerate}
MASTER_PORT=${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 10000))}
if [[ $LAUNCHER != accelerate && $LAUNCHER != srun ]]; then
    echo "LAUNCHER: found $LAUNCHER, allowed are accelerate and srun" >&2
    exit 2
fi

# shellcheck source=launchers/global_batch.sh
source launchers/global_batch.sh

dry_run=0 model=()
if [[ ${1:-} == --dry_run ]]; then
    dry_run=1
    shift
fi
if [[ -n ${MODEL:-} ]]; then
    # shellcheck disable=SC2034  # who sources this uses it
    model=(--model_name_or_path "$MODEL")
fi

# announce COMMAND...: print it as one line that a shell would take.
announce() {
    printf '%q ' "$@"
    echo
}

# gpus_of_job: the GPUs that SLURM gave this job on a node; nothing where it gave none. Older SLURMs tell of those
# asked for by --gres in CUDA_VISIBLE_DEVICES alone.
gpus_of_job() {
    if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
        echo "$SLURM_GPUS_ON_NODE"
    elif [[ -n ${SLURM_JOB_ID:-} && -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l
    fi
}

# find_ranks: RANKS_PER_NODE, where it is not given: a rank a GPU. In a job without GPUs nothing is guessed.
find_ranks() {
    local cores
    RANKS_PER_NODE=${RANKS_PER_NODE:-$(gpus_of_job)}
    if [[ -z $RANKS_PER_NODE && -n ${SLURM_JOB_ID:-} ]]; then
        echo "$JOB_NAME: SLURM gave this job no GPU: submit it with bash, or with sbatch --gpus-per-node=8 (or" \
            "--gres=gpu:8); for ranks on CPUs set RANKS_PER_NODE" >&2
        exit 2
    fi
    RANKS_PER_NODE=${RANKS_PER_NODE:-8}
    cores=${SLURM_CPUS_ON_NODE:-$RANKS_PER_NODE}
    if ((cores < RANKS_PER_NODE)); then
        echo "$JOB_NAME: warning: $RANKS_PER_NODE ranks share $cores cores of a node: submit with bash, which asks for" \
            "CPUS_PER_RANK cores each, or with sbatch --cpus-per-task" >&2
    fi
}

# submit SCRIPT OPTIONS... -- ARGUMENTS...: outside of a job, put the script into the queue with options made from the
# variables; with --dry_run print that command and go on. Within a job nothing.
submit() {
    local script=$1 ranks=${RANKS_PER_NODE:-8} cores=${CPUS_PER_RANK:-8} name=%j gpu command
    shift
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        return
    fi
    command=(sbatch ${NODES:+--nodes="$NODES"})
    if [[ $LAUNCHER == srun ]]; then
        command+=("--ntasks-per-node=$ranks" "--cpus-per-task=$cores")
    else
        command+=(--ntasks-per-node=1 "--cpus-per-task=$((ranks * cores))")
    fi
    gpu=${GPU_OPTION:---gpus-per-node=$ranks}
    [[ $gpu == none ]] || command+=("$gpu")
    while [[ $1 != -- ]]; do
        [[ $1 != --array=* ]] || name=%A_%a
        command+=("$1")
        shift
    done
    shift
    command+=(--export=ALL "--output=${LOG_DIR:-$OUTPUT_DIR/slurm}/%x-$name.out" "$script" "$@")
    if ((dry_run)); then
        announce "${command[@]}"
        return
    fi
    if ! command -v sbatch >/dev/null; then
        echo "$JOB_NAME: sbatch is not on PATH: run it on a login node of the cluster, or give it --dry_run" >&2
        exit 2
    fi
    # SLURM does not make the folder, and a job that cannot write its output fails without a word.
    mkdir -p "${LOG_DIR:-$OUTPUT_DIR/slurm}"
    exec "${command[@]}"
}

# source_hook: the user's own preparations, here and on every node; CONTAINER is what they put before each command.
CONTAINER=()
source_hook() {
    if [[ -n ${HOOK:-} ]]; then
        if [[ ! -r $HOOK ]]; then
            echo "HOOK: $HOOK cannot be read on $(hostname); give a bash file on a disk that every node sees" >&2
            exit 2
        fi
        # Scripts that come with modules and conda use variables that are not set.
        set +u
        # shellcheck disable=SC1090  # the user's
        source "$HOOK"
        set -u
    fi
}

# use_offline_dir: read everything from OFFLINE_DIR, or from this node's own copy of it, and ask no network. One process
# of a node copies, the others wait for it; a copy that was cut short is begun anew. That of an older fetch stays, since
# another job may read it.
use_offline_dir() {
    local from=${OFFLINE_DIR:+$(realpath -m "$OFFLINE_DIR")} to
    [[ -n $from ]] || return 0
    if [[ ! -e $from/pemt-fetched.txt ]]; then
        echo "OFFLINE_DIR: $from was not filled by pemt fetch --to, or is not seen by $(hostname)" >&2
        exit 2
    fi
    if [[ -n ${STAGE_DIR:-} ]]; then
        to=$STAGE_DIR/pemt-$(sha256sum "$from/pemt-fetched.txt" | cut -c 1-12)
        mkdir -p "$STAGE_DIR"
        (
            flock 9
            if [[ ! -e $to ]]; then
                rm -rf "$to.part"
                cp -a "$from" "$to.part"
                mv "$to.part" "$to"
                echo "$JOB_NAME: $(hostname): $from is copied to $to ($(du -sh "$to" | cut -f 1))"
            fi
        ) 9>"$STAGE_DIR/pemt.lock"
        from=$to
    fi
    export HF_HOME=$from HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
    unset HF_HUB_CACHE HUGGINGFACE_HUB_CACHE HF_DATASETS_CACHE
}

# on_nodes NODES COMMAND...: into the array `command`: srun over the nodes, as LAUNCHER says, with the hook first.
# COMMAND is what stands behind `python` or `accelerate launch`.
on_nodes() {
    local nodes=$1 tasks=1 first=FIRST_NODE each
    shift
    if [[ $LAUNCHER == srun ]]; then
        tasks=$RANKS_PER_NODE
    fi
    each=$((${SLURM_CPUS_ON_NODE:-$((RANKS_PER_NODE * ${CPUS_PER_RANK:-8}))} / tasks))
    if ((!dry_run)); then
        first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    fi
    # Since SLURM 22.05 srun does not take over the job's --cpus-per-task.
    command=(srun "--nodes=$nodes" "--ntasks=$((nodes * tasks))" "--ntasks-per-node=$tasks"
        "--cpus-per-task=$((each > 0 ? each : 1))" --kill-on-bad-exit=1)
    if [[ $LAUNCHER == srun ]]; then
        command+=(--distribution=block)
        # Each rank chooses its GPU by its number on the node: all of them have to be in sight.
        [[ -z $(gpus_of_job) ]] || command+=(--gpu-bind=none)
    fi
    command+=(bash launchers/slurm_node.sh "$LAUNCHER" "$first" "$MASTER_PORT" "$RANKS_PER_NODE" "$nodes"
        "$ACCELERATE_YAML" "$DEEPSPEED_JSON" "$@")
}

# tell_environment: which of the variables are set that decide how ranks talk and where files are looked for.
tell_environment() {
    local name
    for name in $(compgen -e | grep -E '^(NCCL_|GLOO_|TORCH_NCCL_|HF_|OMP_NUM|CUDA_VISIBLE|TRITON_CACHE|TORCH_EXT)' |
        grep -vi token); do
        echo "$JOB_NAME: $name=${!name}"
    done
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
