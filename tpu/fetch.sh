#!/usr/bin/env bash
# Copies a run's results (table, figures, metrics, checkpoints) to this machine.
#
#   fetch.sh --run RUN --to FOLDER --bucket BUCKET [--project ID] [--dry-run]              needs no slice
#   fetch.sh --run RUN --to FOLDER --name NAME --zone ZONE [--mount FOLDER] [--slices N] [--project ID] [--dry-run]
#
# The second form copies from worker 0's mount (NFS).  Both write FOLDER/RUN.

# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse 'name zone project slices run to bucket mount' '' "$@"
nothing_after
check run to bucket? project?
if [[ -n $bucket ]]; then
  need_gcloud
  do_ mkdir -p "$to/$run"
  do_ gcloud storage rsync --recursive "gs://$bucket/$run" "$to/$run" ${project:+"--project=$project"}
else
  place
  check mount
  need_gcloud
  do_ mkdir -p "$to"
  tpu scp 0 0 "$name:$mount/$run" "$to" --recurse
fi
