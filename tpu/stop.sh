#!/usr/bin/env bash
# Sends a run the notice (SIGTERM) after which it stores everything and ends with status 75.  The slice stays and costs.
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
