#!/usr/bin/env bash
# Requests a TPU slice, or several of one type, and waits until it is ACTIVE.  Then costs begin.
#
#   create.sh --name NAME --zone ZONE --type TYPE [--slices N] [--spot] [--runtime VERSION] [--project ID]
#             [--service-account EMAIL] [--poll SECONDS] [--wait-only] [--dry-run]
#
#   --type       of one slice: v5litepod-16, v5p-128, v6e-8, ...
#   --slices     number of slices (1); several are NAME-0, NAME-1, ... of one queued resource, joined by the network
#   --spot       cheaper, but Google may take the slice away at any time
#   --runtime    version (default: Google's for the type and JAX)
#   --poll       seconds between two checks of the state (30)
#   --wait-only  wait for an earlier request
#   --dry-run    print the commands
#
# Exit status: 0 ACTIVE; 1 the request failed; 2 an argument is wrong; or gcloud's own.

# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse 'name zone project type runtime slices service-account poll' 'spot wait-only' "$@"
nothing_after
place
check type runtime? service_account? poll

if [[ -z $runtime ]]; then # https://cloud.google.com/tpu/docs/runtimes
  case $type in
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
    *) fail "--runtime must be set with --type $type, got none" ;;
  esac
fi

need_gcloud
words=("$name" "${where[@]}" "--accelerator-type=$type" "--runtime-version=$runtime")
if ((slices > 1)); then
  words+=("--node-count=$slices" "--node-prefix=$name")
else
  words+=("--node-id=$name")
fi
[[ -z $spot ]] || words+=(--spot)
[[ -z $service_account ]] || words+=("--service-account=$service_account")
[[ -n $wait_only ]] || do_ gcloud compute tpus queued-resources create "${words[@]}"

look=(gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)')
show "${look[@]}"
if [[ -n $dry_run ]]; then
  echo "(every $poll s, until the state is ACTIVE)" >&2
  exit
fi
before=''
while true; do
  state=$("${look[@]}") # a failure ends the script with gcloud's status
  [[ $state == "$before" ]] || echo "$(date +%H:%M:%S) $name: $state" >&2
  before=$state
  case $state in
    ACTIVE) exit 0 ;;
    STATE_UNSPECIFIED | CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING) sleep "$poll" ;;
    *)
      echo "error: $name must become ACTIVE, got ${state:-no state}: 'gcloud compute tpus queued-resources" \
        "describe $name ${where[*]}' says why; delete.sh removes it" >&2
      exit 1
      ;;
  esac
done
