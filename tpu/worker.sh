#!/usr/bin/env bash
# What the other scripts run on each worker (Ubuntu); it comes there with the commit.  Not to be called by hand.
#
#   worker.sh install EXTRAS MOUNT gcs|nfs SOURCE    packages, and the storage for results
#   worker.sh ready MOUNT                            whether a run can start
#   worker.sh start RUN [VARIABLE=VALUE...] -- MODULE [ARGUMENT...]
#   worker.sh follow|status|stop RUN
#
# A run keeps ~/gendiff-runs/RUN/{log,pid,status}; ~/gendiff-runs/lock is held while anything uses the TPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
runs=$HOME/gendiff-runs
python=.venv/bin/python
me="worker $(hostname)"

fail() {
  echo "error: $me: $*" >&2
  exit 1
}

install() {
  local extras=$1 mount=$2 kind=$3 source=$4 PS4="$me: + "
  set -x # every command is printed before it runs
  # The runtimes' Ubuntu 22.04 has Python 3.10; uv brings a newer one, without root.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  [[ -x $python ]] || python3 -m uv venv --quiet --seed --python 3.13 .venv
  "$python" -m pip install --quiet ".[$extras]"
  if mountpoint -q "$mount"; then
    echo "$me: $mount is mounted already"
  else
    sudo mkdir -p "$mount"
    sudo chown "$(id -u):$(id -g)" "$mount"
    "mount_$kind" "$source" "$mount"
  fi
  touch "$mount/.gendiff" || fail "$mount: expected storage that can be written to"
  echo "$me: ready, commit $(git rev-parse --short HEAD)"
}

apt_install() { # a machine that has just started updates itself first, and holds the lock
  sudo apt-get -q -o DPkg::Lock::Timeout=600 update
  sudo DEBIAN_FRONTEND=noninteractive apt-get -qy -o DPkg::Lock::Timeout=600 install "$1"
}

# Called by its name, from install.
mount_gcs() {
  local key=/usr/share/keyrings/cloud.google.asc apt=https://packages.cloud.google.com/apt
  if ! command -v gcsfuse >/dev/null; then
    curl -fsSL "$apt/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $apt gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    apt_install gcsfuse
  fi
  # No cache of metadata: what one host has written the others must see at once.  Checkpoints are renamed as folders.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --rename-dir-limit=200000 "$1" "$2"
}

mount_nfs() {
  command -v mount.nfs >/dev/null || apt_install nfs-common
  sudo mount -t nfs -o actimeo=0,lookupcache=none "$1" "$2" # as above: no cache of metadata
  [[ -w $2 ]] || sudo chmod 1777 "$2" # a new share belongs to root
}

ready() {
  [[ -x $python ]] || fail "expected $PWD/$python: run install.sh"
  mountpoint -q "$1" || fail "$1: expected to be mounted: run install.sh again"
  mkdir -p "$runs"
  flock -n "$runs/lock" true || fail "expected no run, found $(cat "$runs/current") still running"
}

start() {
  local run=$1 variables=()
  shift
  while [[ $1 != -- ]]; do
    variables+=("$1")
    shift
  done
  shift
  mkdir -p "$runs/$run"
  # The lock passes to the run and is freed by its end, however it ends; a second start fails here.
  exec 9>"$runs/lock"
  flock -n 9 || fail "expected no run, found $(cat "$runs/current") still running"
  echo "$run" >"$runs/current"
  rm -f "$runs/$run/status"
  detached "$run" ${variables[@]+"${variables[@]}"} -- "$@" >>"$runs/$run/log" 2>&1 </dev/null
  echo "$me: started"
}

detached() { # a session of its own: the end of the ssh connection is none of its business
  setsid bash tpu/worker.sh attached "$@" &
  echo $! >"$runs/$run/pid"
}

attached() {
  local run=$1 variables=() status=0
  shift
  while [[ $1 != -- ]]; do
    variables+=("$1")
    shift
  done
  shift
  trap : TERM # the experiment gets it too, and stores everything; its status is still to be written
  printf '== %s, commit %s:' "$(date -u +%FT%TZ)" "$(git rev-parse --short HEAD)"
  printf ' %q' "$@"
  printf '\n'
  env PYTHONUNBUFFERED=1 ${variables[@]+"${variables[@]}"} "$python" -m "$@" || status=$?
  echo "$status" >"$runs/$run/status.tmp"
  mv "$runs/$run/status.tmp" "$runs/$run/status"
}

known() { [[ -f $runs/$1/pid ]] || fail "$1: expected a run that was started here, found none"; }

going() { [[ ! -f $runs/$1/status && $(cat "$runs/current") == "$1" ]] && ! flock -n "$runs/lock" true; }

follow() {
  known "$1"
  if going "$1"; then
    tail -n +1 -F --pid="$(cat "$runs/$1/pid")" "$runs/$1/log"
  else
    cat "$runs/$1/log"
  fi
  [[ -f $runs/$1/status ]] || fail "$1: expected an exit status, found none: killed, or the machine was restarted"
  exit "$(cat "$runs/$1/status")"
}

status() {
  known "$1"
  if going "$1"; then
    echo "$me: running"
  else
    echo "$me: ended, status $(cat "$runs/$1/status" 2>/dev/null || echo 'none: killed, or the machine was restarted')"
  fi
}

stop() {
  known "$1"
  if going "$1"; then
    kill -TERM -- "-$(cat "$runs/$1/pid")" # the whole session
    echo "$me: told to stop"
  else
    echo "$me: not running"
  fi
}

case ${1:-} in
  install | ready | start | attached | follow | status | stop) "$@" ;;
  *) fail "expected install, ready, start, follow, status or stop, given ${1:-nothing}" ;;
esac
