#!/usr/bin/env bash
#SBATCH --job-name=imagenet_check
#SBATCH --array=0-49
#SBATCH --cpus-per-task=8
#SBATCH --time=02:00:00
#SBATCH --output=%x-%A-%a.log
#SBATCH --requeue
#
# sbatch [SBATCH FLAGS] slurm/imagenet_check.sh DATA
#
# Opens and decodes every file of DATA, a folder with train/ and val/: each task of the array takes a slice of the
# classes, and the last to end writes REPORT/summary.txt. Exit status 1 where faults are found. Without SLURM, one
# process does all: bash slurm/imagenet_check.sh DATA. REPORT, and what prune_resnet18.sh says of PYTHON, SETUP,
# CONTAINER and SITE, are taken from the environment.
set -euo pipefail
if [[ $# != 1 || $1 == -* ]]; then
    echo "error: DATA is missing: sbatch slurm/imagenet_check.sh /path/to/imagenet" >&2
    exit 2
fi
script=$0
[[ -f $(dirname "$script")/common.sh ]] ||
    script=$(scontrol show job -o "$SLURM_JOB_ID" | grep -o ' Command=[^ ]*' | cut -d= -f2- | head -n 1)
project=$(cd "$(dirname "$script")/.." && pwd)
source "$project/slurm/common.sh"
enter_environment "$project" || exit
index=$((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0}))
export PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH}
exec "${interpreter[@]}" -m dist_prune.data.verify "$1" --slice "$index/${SLURM_ARRAY_TASK_COUNT:-1}" \
    --report "${REPORT:-imagenet_check-${SLURM_ARRAY_JOB_ID:-$$}}" --threads "${SLURM_CPUS_PER_TASK:-8}"
