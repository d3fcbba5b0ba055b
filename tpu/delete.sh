#!/usr/bin/env bash
# Deletes a slice, or the slices of a queued resource, which ends their costs.  Buckets and file servers stay.
#
#   delete.sh --name NAME --zone ZONE [--project ID] [--yes] [--dry-run]
#
#   --yes      do not ask

# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse 'name zone project' 'yes' "$@"
nothing_after
place
need_gcloud
do_ gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force ${yes:+--quiet}
