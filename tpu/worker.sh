#!/usr/bin/env bash
# Runs on the workers (Ubuntu), called by the other scripts; it arrives with the commit.  Do not call it by hand.
#
#   worker.sh install EXTRAS MOUNT gcs|nfs SOURCE    install packages, mount the storage for results
#   worker.sh ready MOUNT                            fail unless a run can start
#   worker.sh start RUN [VARIABLE=VALUE...] -- MODULE [ARGUMENT...]
#   worker.sh follow|status|stop RUN
#
# A run writes ~/gendiff-runs/RUN/{log,pid,status}, and holds ~/gendiff-runs/lock while it uses the TPU.
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
  set -x
  # uv installs a newer Python without root, because the runtimes' Ubuntu 22.04 has 3.10.
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
  touch "$mount/.gendiff" || fail "$mount must be writable, got storage that is not"
  echo "$me: ready, commit $(git rev-parse --short HEAD)"
}

apt_install() { # a new machine updates itself first, and holds the lock
  sudo apt-get -q -o DPkg::Lock::Timeout=600 update
  sudo DEBIAN_FRONTEND=noninteractive apt-get -qy -o DPkg::Lock::Timeout=600 install "$1"
}

# Called from install, by its name.
mount_gcs() {
  local key=/usr/share/keyrings/cloud.google.asc apt=https://packages.cloud.google.com/apt
  if ! command -v gcsfuse >/dev/null; then
    curl -fsSL "$apt/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $apt gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    apt_install gcsfuse
  fi
  # No metadata cache, because all hosts must see a new file at once.  Checkpoints are renamed as folders.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --rename-dir-limit=200000 "$1" "$2"
}

mount_nfs() {
  command -v mount.nfs >/dev/null || apt_install nfs-common
  sudo mount -t nfs -o actimeo=0,lookupcache=none "$1" "$2" # no metadata cache, as above
  [[ -w $2 ]] || sudo chmod 1777 "$2" # a new share belongs to root
}

ready() {
  [[ -x $python ]] || fail "$PWD/$python must exist, got none: run install.sh"
  mountpoint -q "$1" || fail "$1 must be mounted, got no mount: run install.sh again"
  mkdir -p "$runs"
  flock -n "$runs/lock" true || fail "no run must be going on, got $(cat "$runs/current"): stop.sh ends it"
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
  # The run inherits the lock and frees it at its end; a second start fails here.
  exec 9>"$runs/lock"
  flock -n 9 || fail "no run must be going on, got $(cat "$runs/current"): stop.sh ends it"
  echo "$run" >"$runs/current"
  rm -f "$runs/$run/status"
  detached "$run" ${variables[@]+"${variables[@]}"} -- "$@" >>"$runs/$run/log" 2>&1 </dev/null
  echo "$me: started"
}

detached() { # in its own session, so that the end of the ssh connection does not end the run
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
  trap : TERM # the experiment gets SIGTERM too, and this process must write its status
  printf '== %s, commit %s:' "$(date -u +%FT%TZ)" "$(git rev-parse --short HEAD)"
  printf ' %q' "$@"
  printf '\n'
  env PYTHONUNBUFFERED=1 ${variables[@]+"${variables[@]}"} "$python" -m "$@" || status=$?
  echo "$status" >"$runs/$run/status.tmp"
  mv "$runs/$run/status.tmp" "$runs/$run/status"
}

known() { [[ -f $runs/$1/pid ]] || fail "$1 must be a run of this worker, got no such run"; }

going() { [[ ! -f $runs/$1/status && $(cat "$runs/current") == "$1" ]] && ! flock -n "$runs/lock" true; }

follow() {
  known "$1"
  if going "$1"; then
    tail -n +1 -F --pid="$(cat "$runs/$1/pid")" "$runs/$1/log"
  else
    cat "$runs/$1/log"
  fi
  [[ -f $runs/$1/status ]] || fail "$1 must have an exit status, got none: it was killed, or the machine restarted"
  exit "$(cat "$runs/$1/status")"
}

status() {
  known "$1"
  if going "$1"; then
    echo "$me: running"
  else
    echo "$me: ended, status $(cat "$runs/$1/status" 2>/dev/null || echo 'none: killed, or the machine restarted')"
  fi
}

stop() {
  known "$1"
  if going "$1"; then
    kill -TERM -- "-$(cat "$runs/$1/pid")" # all processes of the session
    echo "$me: stopping"
  else
    echo "$me: not running"
  fi
}

case ${1:-} in
  install | ready | start | attached | follow | status | stop) "$@" ;;
  *) fail "command must be install, ready, start, follow, status or stop, got ${1:-none}" ;;
esac
