#!/usr/bin/env bash
# Sends SIGTERM to a run, which then stores everything and exits with status 75.  The slice stays, and costs.
#
#   stop.sh --name NAME --zone ZONE --run RUN [--slices N] [--project ID] [--dry-run]

# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse 'name zone project slices run' '' "$@"
nothing_after
place
check run
need_gcloud
remote all all bash gendiff/tpu/worker.sh stop "$run"
