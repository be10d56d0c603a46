# What every job of this project does around its srun: functions, to be sourced.

# say_error MESSAGE: as the program itself says it.
say_error() { echo "error: $*" >&2; }

# enter_environment PROJECT: source SETUP, and choose what starts Python on a node, the array `interpreter`: after the
# words of CONTAINER, PYTHON or the active environment's, else that of PROJECT/.venv. Then what SITE, a TOML file, says.
enter_environment() {
    local project=$1 python=${PYTHON:-python} site
    # shellcheck source=/dev/null
    [[ -z ${SETUP:-} ]] || source "$SETUP"
    [[ -n ${PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-}${CONTAINER:-} || ! -x $project/.venv/bin/python ]] ||
        python=$project/.venv/bin/python
    # shellcheck disable=SC2206  CONTAINER is words
    interpreter=(${CONTAINER:-} "$python")
    [[ -n ${SITE:-} ]] || return 0
    site=$(PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH} "${interpreter[@]}" -m dist_prune.cluster.profile --shell "$SITE") || return 2
    eval "$site"
}

# Ranks find their place in srun's variables; another launcher's, inherited from a shell, would win over them.
# The address is the one under which SLURM itself reaches the first node, the port follows from the job's number.
prepare_meeting() {
    unset RANK WORLD_SIZE LOCAL_RANK MASTER_PORT
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_ADDR=$(scontrol show node -o "$first" | grep -o ' NodeAddr=[^ ]*' | cut -d= -f2)
    export MASTER_ADDR
}

# One task for each GPU, or some would idle while others share.
require_a_task_per_gpu() {
    local gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-0}} tasks=${SLURM_TASKS_PER_NODE:-1}
    gpus=${gpus##*:} tasks=${tasks%%(*}
    if ((gpus > 0)) && [[ $tasks != "$gpus" ]]; then
        say_error "$gpus GPUs per node but ntasks-per-node=$tasks: set --ntasks-per-node=$gpus"
        return 2
    fi
}

# require_on_every_node PATH…: before the ranks start, look for each path on each node of the job.
require_on_every_node() {
    srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task=1 --overlap bash -c '
        for path; do
            [[ -e $path ]] && continue
            echo "error: $path is not there on node $SLURMD_NODENAME: put it on a file system all nodes share" >&2
            missing=1
        done
        exit ${missing:-0}' bash "$@" </dev/null || return 2
}

# run_ranks COMMAND…: one srun task for each GPU; the exit status is srun's. SLURM signals the ranks itself;
# this shell only has to outlive the signals, and a wait that a trap broke off is taken up again.
run_ranks() {
    trap : TERM USR1 USR2
    # Neighbouring ranks on one socket, as their GPUs are; SLURM's own default deals them out in turns.
    srun --kill-on-bad-exit=1 --distribution=block:block --ntasks-per-node="${SLURM_TASKS_PER_NODE%%(*}" \
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$@" </dev/null &
    local ranks=$! status=0
    wait "$ranks" || status=$?
    while kill -0 "$ranks" 2>/dev/null; do
        status=0
        wait "$ranks" || status=$?
    done
    return "$status"
}

# requeue_if_stopped STATUS RETRIES: queue the job again if its ranks stopped because a signal asked them to (75), if
# the warning ended them while they still started (USR1 138, USR2 140; ten times at most), or if they failed and the
# job was restarted fewer than RETRIES times; never one that was cancelled.
requeue_if_stopped() {
    local status=$1 retries=$2 restarts=${SLURM_RESTART_COUNT:-0} job=$SLURM_JOB_ID
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
    job=${job:-$SLURM_JOB_ID}
    ((status == 138 || status == 140)) && retries=$((retries > 10 ? retries : 10))
    ((status == 75 || (status != 0 && status != 2 && status != 3 && restarts < retries))) || return 0
    scontrol show job -o "$SLURM_JOB_ID" | grep -Eq 'JobState=(RUNNING|SIGNALING) .*BatchFlag=1 ' || return 0
    echo "ranks ended with status $status: queued again, to go on from the last checkpoint"
    trap - TERM USR1 USR2
    scontrol requeue "$job" && sleep 60 # until SLURM ends this shell: ending by itself could overtake the requeue
}
