#!/usr/bin/env bash
# Starts an experiment on all workers, where it goes on when this connection ends.  The same line again continues it.
#
#   launch.sh --name NAME --zone ZONE --run RUN [--env VARIABLE=VALUE]... [--mount FOLDER] [--slices N] [--project ID]
#             [--dry-run] -- MODULE [ARGUMENT...]
#   launch.sh ... --run table1 -- experiments.genneg.traffic --preset paper
#
#   --run      names the results: FOLDER/RUN becomes the experiment's --output
#   --mount    as for install.sh (/mnt/gendiff)
#   --env      for the experiment, as GENDIFF_HEARTBEAT_SECONDS=60; again for more
#   --slices   as for create.sh
#   --dry-run  print the commands
#
# Every ARGUMENT reaches the experiment as it is given here.  A run that is going on is not disturbed: that is an error.

# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse 'name zone project slices run mount env' '' "$@"
# shellcheck disable=SC2034 # check reads it
module=${rest[0]:-}
place
check run mount module
for each in ${env[@]+"${env[@]}"}; do
  [[ $each =~ ^[A-Z_][A-Z0-9_]*= ]] || fail "--env: expected VARIABLE=VALUE, given $(printf %q "$each")"
done
for each in "${rest[@]:1}"; do
  [[ $each != --output && $each != --output=* ]] || fail "--output: expected none, given one: results go to $mount/$run"
done

need_gcloud

# Two steps: it starts nowhere if one worker is not ready, since the others would wait for it in vain.
remote all all bash gendiff/tpu/worker.sh ready "$mount"
remote all all bash gendiff/tpu/worker.sh start "$run" ${env[@]+"${env[@]}"} -- "${rest[@]}" --output "$mount/$run"
echo "(follow.sh shows its log; results: $mount/$run)" >&2
