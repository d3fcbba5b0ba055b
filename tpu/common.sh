# shellcheck shell=bash
# Read by the scripts beside it: their options, the check of every value, and commands that are printed before they run.
# Written for bash 3.2 (macOS) and later.
# shellcheck disable=SC2034  # a script reads the options that it names
set -euo pipefail

name='' zone='' project='' type='' runtime='' slices=1 spot='' service_account='' poll=30 wait_only='' dry_run=''
url='' commit='' extras=tpu bucket='' nfs='' mount=/mnt/gendiff run='' module='' slice=0 worker=0 to='' yes='' all=''
env=() rest=()

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# The comment at the top of the script is its help.
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# parse OPTIONS FLAGS ARGUMENT...: sets the variable of each option, 1 for a flag; what follows -- goes to `rest`.
parse() {
  local options=" $1 " flags=" $2 dry-run " option
  shift 2
  while (($#)); do
    case $1 in
      -h | --help)
        usage
        exit 0
        ;;
      --)
        shift
        rest=("$@")
        break
        ;;
      --*=*)
        option=${1%%=*}
        set -- "$option" "${1#*=}" "${@:2}"
        [[ $flags != *" ${option#--} "* ]] || fail "$option: expected no value, given $(printf %q "$2")"
        continue
        ;;
    esac
    option=${1#--}
    if [[ ! $1 =~ ^--[a-z-]+$ ]]; then
      fail "expected an option, given $(printf %q "$1") (--help lists them)"
    elif [[ $flags == *" $option "* ]]; then
      printf -v "${option//-/_}" 1
      shift
    elif [[ $options == *" $option "* ]]; then
      (($# > 1)) || fail "--$option: expected a value, given none"
      if [[ $option == env ]]; then env+=("$2"); else printf -v "${option//-/_}" %s "$2"; fi
      shift 2
    else
      fail "--$option: expected an option of this script, given another one (--help lists them)"
    fi
  done
}

# check OPTION...: each has a value of its form; with a ? after it, or none.
check() {
  local LC_ALL=C option value form words
  for option; do
    case ${option%\?} in
      name) form='[a-z]([-a-z0-9]{0,60}[a-z0-9])?' words='lower-case letters, digits and -' ;;
      zone) form='[a-z]+-[a-z]+[0-9]+-[a-z]' words='a zone such as us-west4-a' ;;
      project) form='[a-z][-a-z0-9:.]*[a-z0-9]' words='the id of a project' ;;
      type) form='[a-z0-9]+-[0-9]+' words='an accelerator type such as v5litepod-16' ;;
      runtime) form='[a-z0-9][-a-z0-9.]*' words='a runtime version such as v2-alpha-tpuv5-lite' ;;
      slices) form='[1-9][0-9]{0,2}' words='1 to 999' ;;
      slice | poll) form='[0-9]{1,4}' words='a whole number' ;;
      worker) form='[0-9]{1,4}' words='the number of a worker' ;;
      service_account) form='[-a-z0-9]+@[-a-z0-9.]+' words='the e-mail address of a service account' ;;
      url) form='(https://|ssh://|git@)[-A-Za-z0-9@:/._~+]+' words='https://, ssh:// or git@' ;;
      commit) form='[0-9a-f]{40}' words='the 40 digits of a commit' ;;
      extras) form='[a-z]+(,[a-z]+)*' words='extras such as tpu,traffic' ;;
      bucket) form='[a-z0-9][-a-z0-9_.]{1,220}[a-z0-9]' words='the name of a bucket, without gs://' ;;
      nfs) form='[A-Za-z0-9.-]+:/[A-Za-z0-9/._-]+' words='SERVER:/SHARE' ;;
      mount) form='/[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*' words='an absolute folder without spaces' ;;
      run) form='[A-Za-z0-9][A-Za-z0-9_-]{0,99}' words='letters, digits, _ and -' ;;
      module) form='experiments(\.[a-z_][a-z0-9_]*)+' words='a module such as experiments.genneg.traffic' ;;
      to) form='[^-:][^:]*' words='a folder, without a colon' ;; # scp takes one for a machine's name
      *) fail "no form for $option" ;;
    esac
    value=${option%\?}
    value=${!value}
    [[ $option != *\? || -n $value ]] || continue
    option=--${option%\?}
    [[ $option != --module ]] || option='after --' # the one value that has no option
    [[ -n $value ]] || fail "${option//_/-}: expected $words, given none"
    [[ $value =~ ^($form)$ ]] || fail "${option//_/-}: expected $words, given $(printf %q "$value")"
  done
}

# The slice's name, and the options that say where it is.
place() {
  check name zone project? slices
  where=("--zone=$zone")
  [[ -z $project ]] || where+=("--project=$project")
}

nothing_after() { ((${#rest[@]} == 0)) || fail "after --: expected nothing, given $(printf %q "${rest[0]}")"; }

need_gcloud() {
  [[ -n $dry_run ]] || command -v gcloud >/dev/null ||
    fail 'gcloud: expected on PATH (https://cloud.google.com/sdk/docs/install), found none'
}

show() { { printf '+' && printf ' %q' "$@" && printf '\n'; } >&2; }

# Prints a command as a shell would read it, and runs it if this is no dry run.
do_() {
  show "$@"
  [[ -n $dry_run ]] || "$@"
}

# tpu ssh|scp SLICE WORKER OPERAND...: on the one slice, or on slices (a number or all) of the queued resource.
tpu() {
  local verb=$1 node=$2 on=$3
  shift 3
  if ((slices > 1)); then
    do_ gcloud compute tpus queued-resources "$verb" "$@" "${where[@]}" "--node=$node" "--worker=$on"
  else
    do_ gcloud compute tpus tpu-vm "$verb" "$@" "${where[@]}" "--worker=$on"
  fi
}

# remote SLICE WORKER WORD...: runs a command there.  The far shell reads every word as one literal argument.
remote() {
  local node=$1 on=$2 command
  shift 2
  printf -v command ' %q' "$@"
  tpu ssh "$node" "$on" "$name" "--command=${command# }"
}
