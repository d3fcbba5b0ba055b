#!/usr/bin/env bash
# Shows a run's log from its beginning until it ends, and ends with the run's exit status.  Ctrl-C leaves the run alone.
#
#   follow.sh --name NAME --zone ZONE --run RUN [--worker N] [--slice N] [--slices N] [--project ID] [--dry-run]
#   follow.sh ... --all     one line for each worker: running, or its exit status
#
#   --worker   whose log (0, which prints the progress and the table); --slice: of which slice (0)
#   --slices   as for create.sh
#   --dry-run  print the command

# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse 'name zone project slices run worker slice' 'all' "$@"
nothing_after
place
check run worker slice
need_gcloud
if [[ -n $all ]]; then
  remote all all bash gendiff/tpu/worker.sh status "$run"
  exit
fi
status=0
remote "$slice" "$worker" bash gendiff/tpu/worker.sh follow "$run" || status=$?
case $status in
  70 | 134) echo 'another process of the run was lost: start it again with the same launch.sh' >&2 ;;
  75) echo 'stopped by a notice, everything is stored: start it again with the same launch.sh' >&2 ;;
esac
exit "$status"
