#!/usr/bin/env bash
# What `srun` starts on every node of a SLURM job, or for every rank: nobody else runs it.
#
#   slurm_node.sh LAUNCHER FIRST_NODE PORT RANKS_PER_NODE NODES ACCELERATE_YAML DEEPSPEED_JSON -m pemt ARGUMENTS...
#
# It sources HOOK, copies OFFLINE_DIR to this node's own STAGE_DIR, and starts the ranks, of which one copies there what
# the run is given as a folder (slurm_common.sh explains the variables; they come through srun). Beside them:
#   OMP_NUM_THREADS  threads of a rank (the task's cores, shared out among its ranks)
set -euo pipefail
JOB_NAME=slurm_node.sh
# shellcheck source=launchers/slurm_common.sh
source launchers/slurm_common.sh
launcher=$1 first=$2 port=$3 ranks=$4 nodes=$5 yaml=$6 json=$7
shift 7
source_hook
use_offline_dir
if [[ -n ${STAGE_DIR:-} ]]; then
    export PEMT_STAGE_DIR=$STAGE_DIR
fi

if [[ $launcher == srun ]]; then
    # What a launcher would tell each rank. Its number on the node counts from 0 there, as block distribution has it.
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$((nodes * ranks)) LOCAL_WORLD_SIZE=$ranks
    export MASTER_ADDR=$first MASTER_PORT=$port
    export ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_CONFIG_FILE=$json
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    exec "${CONTAINER[@]}" python "$@"
fi
threads=$((${SLURM_CPUS_PER_TASK:-1} / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
launch=(accelerate launch --config_file "$yaml" --deepspeed_config_file "$json" --num_machines "$nodes"
    --num_processes "$((nodes * ranks))")
if ((nodes > 1)); then
    # Each copy learns from SLURM_NODEID which machine it is.
    launch+=(--machine_rank "$SLURM_NODEID" --main_process_ip "$first" --main_process_port "$port")
fi
exec "${CONTAINER[@]}" "${launch[@]}" "$@"
