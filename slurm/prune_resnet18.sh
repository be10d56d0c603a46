#!/usr/bin/env bash
#SBATCH --job-name=prune_resnet18
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR2@180
#
# sbatch [SBATCH FLAGS] slurm/prune_resnet18.sh DATA [-- FLAGS OF A RUN]
#
# Compresses a network on all GPUs of the job, one task each; DATA is a folder with train/ and val/. Every #SBATCH line
# above can be overridden on the command line of sbatch. Also runs in a shell that salloc opened. What changes:
#   RECIPE     recipe of the run                       (resnet18-imagenet)
#   RUN_DIR    where everything is written; a run that is there already is continued  (runs/RECIPE-JOB)
#   PYTHON     interpreter                             (the active environment's, else .venv's)
#   SETUP      file to source first: modules, environments
#   CONTAINER  words before the interpreter, such as "apptainer exec --nv image.sif"
#   SITE       TOML file whose lines of set-up and interpreter are used, see site.example.toml; its #SBATCH lines are
#              for sbatch itself: sbatch $(python -m dist_prune.cluster.profile site.toml) slurm/prune_resnet18.sh DATA
#   RETRIES    how often a job whose ranks failed is queued again  (0)
set -uo pipefail

if [[ $# == 0 || $1 == -* ]]; then
    echo "error: DATA is missing: sbatch slurm/prune_resnet18.sh /path/to/imagenet [-- FLAGS OF A RUN]" >&2
    exit 2
elif [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "error: not in a SLURM job: submit this script with sbatch, or run it in a shell that salloc opened" >&2
    exit 2
fi
for word in "$@"; do
    case $word in --run-dir | --resume | --overwrite)
        echo "error: $word: set RUN_DIR instead; a run that is there already is continued" >&2
        exit 2 ;;
    esac
done

# sbatch runs a copy: the original's place is known to SLURM.
script=$0
[[ -f $(dirname "$script")/common.sh ]] ||
    script=$(scontrol show job -o "$SLURM_JOB_ID" | grep -o ' Command=[^ ]*' | cut -d= -f2-)
project=$(cd "$(dirname "$script")/.." && pwd)

recipe=${RECIPE:-resnet18-imagenet}
data=$1
shift
[[ ${1:-} == -- ]] && shift
run=$(realpath -m "${RUN_DIR:-runs/$recipe-$SLURM_JOB_ID}")
[[ $data == digits ]] || data=$(realpath -m "$data")

code=$run/code
bash "$project/slurm/snapshot.sh" "$project" "$code" || exit 2
source "$code/slurm/common.sh"
enter_environment "$project" || exit

echo "run      $run, job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST"
echo "log      $run/log.txt"
echo "result   $run/result.json"
echo "curves   tensorboard --logdir $(dirname "$run")"

require_a_task_per_gpu || exit
prepare_meeting
paths=("$code/COMMIT")
[[ $data == digits ]] || paths+=("$data/train" "$data/val")
require_on_every_node "${paths[@]}" || exit

[[ -f $run/config.json ]] && set -- --resume "$@"
export PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH}
run_ranks "${interpreter[@]}" "$code/launch/local.py" "$recipe" --data "$data" --run-dir "$run" "$@"
status=$?
requeue_if_stopped "$status" "${RETRIES:-0}"
exit "$status"
