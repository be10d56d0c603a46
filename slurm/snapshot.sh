#!/usr/bin/env bash
# snapshot.sh SOURCE FOLDER: copy the code of SOURCE into FOLDER, whole or not at all, and note its commit.
# Does nothing where FOLDER is already: a requeued job runs the code it began with.
set -euo pipefail
source=$1 folder=$2
[[ -d $folder ]] && exit
aside=$folder.$$
mkdir -p "$aside"
trap 'rm -rf "$aside"' EXIT
cp -r "$source/dist_prune" "$source/launch" "$source/slurm" "$source/pyproject.toml" "$aside"
find "$aside" -name __pycache__ -prune -exec rm -rf {} +
commit=$(git -C "$source" rev-parse HEAD 2>/dev/null) || commit=unknown
changed=$(git -C "$source" status --porcelain --untracked-files=no 2>/dev/null) || changed=
echo "$commit${changed:++}" >"$aside/COMMIT"
mv -T "$aside" "$folder" 2>/dev/null || [[ -d $folder ]] # another one may have been faster
