#!/usr/bin/env bash
# Shows a run's log from its beginning to its end, and exits with the run's status.  Ctrl-C does not stop the run.
#
#   follow.sh --name NAME --zone ZONE --run RUN [--worker N] [--slice N] [--slices N] [--project ID] [--dry-run]
#   follow.sh ... --all     one line a worker: running, or its exit status
#
#   --worker   number of the worker (0, which prints progress and the table); --slice: its slice (0)
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
  70 | 134) echo 'another process of the run was lost: run the same launch.sh again' >&2 ;;
  75) echo 'stopped by a notice, and everything is stored: run the same launch.sh again' >&2 ;;
esac
exit "$status"
