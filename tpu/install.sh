#!/usr/bin/env bash
# Installs this project and its packages on all workers, and mounts the storage for results.  Run it for every commit.
#
#   install.sh --name NAME --zone ZONE (--bucket BUCKET | --nfs SERVER:/SHARE) [--extras tpu,traffic] [--mount FOLDER]
#              [--url URL --commit SHA] [--slices N] [--project ID] [--dry-run]
#
#   --bucket   a Cloud Storage bucket, mounted by gcsfuse; --nfs: a Filestore instance or another NFS server
#   --mount    folder of the storage on every worker (/mnt/gendiff)
#   --extras   extras of pyproject.toml (tpu); traffic needs tpu,traffic
#   --url      repository of the commit (default: send the commit that is checked out here, as a git bundle)
#   --slices   as for create.sh
#   --dry-run  print the commands

# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse 'name zone project slices bucket nfs mount extras url commit' '' "$@"
nothing_after
place
check bucket? nfs? mount extras url? commit?
[[ -n $bucket || -n $nfs ]] || fail '--bucket or --nfs must be set, got none: all hosts must see the results'
[[ -z $bucket || -z $nfs ]] || fail '--bucket or --nfs must be set, got both'
[[ -z $url || -n $commit ]] || fail '--commit must be set with --url, got none'
[[ -n $url || -z $commit ]] || fail '--url must be set with --commit, got none: without both, the commit here is sent'
[[ ",$extras," == *,tpu,* ]] || fail "--extras must include tpu, got $extras"
need_gcloud

if [[ -z $url ]]; then
  here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  commit=$(git -C "$here" rev-parse HEAD) || fail "$here must be a git repository, got none: set --url and --commit"
  [[ -z $(git -C "$here" status --porcelain) ]] || echo 'warning: uncommitted changes are not sent' >&2
  folder=/tmp/gendiff
  if [[ -z $dry_run ]]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
  fi
  do_ git -C "$here" bundle create --quiet "$folder/gendiff.bundle" HEAD
  tpu scp all all "$folder/gendiff.bundle" "$name:gendiff.bundle"
  url=../gendiff.bundle # from ~/gendiff
fi
remote all all git init -q gendiff
remote all all git -C gendiff fetch -q "$url" HEAD '+refs/heads/*:refs/remotes/origin/*'
remote all all git -C gendiff checkout -q --force --detach "$commit"
remote all all bash gendiff/tpu/worker.sh install "$extras" "$mount" "${bucket:+gcs}${nfs:+nfs}" "$bucket$nfs"
