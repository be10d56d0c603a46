#!/usr/bin/env bash
# sweep.sh DATA [KEY=VALUE,VALUE…]… [-- FLAGS OF launch/submit.py AND OF EVERY RUN]
#
# Submits every combination of the values, an array of runs that share their statistics; to be run on a login node.
# Running it again submits what is missing or failed. RECIPE, PYTHON and SITE (a TOML file, see site.example.toml)
# are taken from the environment.
set -euo pipefail
if [[ $# == 0 || $1 == -* ]]; then
    echo "error: DATA is missing: bash slurm/sweep.sh /path/to/imagenet method=pca,fisher seed=0,1,2 [-- FLAGS]" >&2
    exit 2
fi
project=$(cd "$(dirname "$0")/.." && pwd)
data=$1
shift
axes=()
while [[ $# -gt 0 && $1 != -- ]]; do
    axes+=("$1")
    shift
done
[[ ${1:-} == -- ]] && shift
[[ ${#axes[@]} -gt 0 ]] || axes=(method=pca,fisher ranks=budget:macs=0.6,budget:macs=0.4 seed=0,1,2)
[[ -n ${PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-} || ! -x $project/.venv/bin/python ]] || PYTHON=$project/.venv/bin/python
exec "${PYTHON:-python}" "$project/launch/submit.py" --recipe "${RECIPE:-resnet18-imagenet}" ${SITE:+--site "$SITE"} \
    --data "$data" --sweep "${axes[@]}" "$@"
