#!/usr/bin/env bash
# Starts an experiment on all workers; it goes on when this connection ends.  The same command resumes a stopped run.
#
#   launch.sh --name NAME --zone ZONE --run RUN [--env VARIABLE=VALUE]... [--mount FOLDER] [--slices N] [--project ID]
#             [--dry-run] -- MODULE [ARGUMENT...]
#   launch.sh ... --run table1 -- experiments.genneg.traffic --preset paper
#
#   --run      name of the run: the experiment's --output becomes FOLDER/RUN
#   --mount    as for install.sh (/mnt/gendiff)
#   --env      variable of the experiment, such as GENDIFF_HEARTBEAT_SECONDS=60; repeat it for others
#   --slices   as for create.sh
#   --dry-run  print the commands
#
# Every ARGUMENT reaches the experiment unchanged.  If a run is going on, this is an error and does not disturb it.

# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse 'name zone project slices run mount env' '' "$@"
# shellcheck disable=SC2034 # check reads it
module=${rest[0]:-}
place
check run mount module
for setting in ${env[@]+"${env[@]}"}; do
  [[ $setting =~ ^[A-Z_][A-Z0-9_]*= ]] || fail "--env must be VARIABLE=VALUE, got $(printf %q "$setting")"
done
for word in "${rest[@]:1}"; do
  [[ $word != --output && $word != --output=* ]] || fail "--output must not be set, got one: results go to $mount/$run"
done

need_gcloud

# Check all workers before the start, because the others would wait in vain for a worker that is not ready.
remote all all bash gendiff/tpu/worker.sh ready "$mount"
remote all all bash gendiff/tpu/worker.sh start "$run" ${env[@]+"${env[@]}"} -- "${rest[@]}" --output "$mount/$run"
echo "(follow.sh shows its log; results: $mount/$run)" >&2
