#!/usr/bin/env bash
# Puts this project and its packages on all workers, and mounts the storage for results.  Again for another commit.
#
#   install.sh --name NAME --zone ZONE (--bucket BUCKET | --nfs SERVER:/SHARE) [--extras tpu,traffic] [--mount FOLDER]
#              [--url URL --commit SHA] [--slices N] [--project ID] [--dry-run]
#
#   --bucket   a Cloud Storage bucket, mounted by gcsfuse; --nfs: a Filestore instance or another NFS server
#   --mount    where, on every worker (/mnt/gendiff)
#   --extras   of pyproject.toml (tpu); traffic needs tpu,traffic
#   --url      a repository to fetch the commit from; default: the commit that is checked out here, as a git bundle
#   --slices   as for create.sh
#   --dry-run  print the commands

# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse 'name zone project slices bucket nfs mount extras url commit' '' "$@"
nothing_after
place
check bucket? nfs? mount extras url? commit?
[[ -n $bucket || -n $nfs ]] || fail '--bucket or --nfs: expected one, given none: all hosts must see the results'
[[ -z $bucket || -z $nfs ]] || fail '--bucket or --nfs: expected one, given both'
[[ -z $url || -n $commit ]] || fail '--commit: expected with --url, given none'
[[ -n $url || -z $commit ]] || fail '--url: expected with --commit, given none (with neither: what is checked out here)'
[[ ",$extras," == *,tpu,* ]] || fail "--extras: expected tpu among them, given $extras"
need_gcloud

if [[ -z $url ]]; then
  here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  commit=$(git -C "$here" rev-parse HEAD) || fail "$here: expected a git repository, or --url and --commit"
  [[ -z $(git -C "$here" status --porcelain) ]] || echo 'warning: changes that are not committed stay here' >&2
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
