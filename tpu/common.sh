# shellcheck shell=bash
# The scripts beside it source this file: it parses options, checks values, and prints commands before it runs them.
# Written for bash 3.2 (macOS) and later.
# shellcheck disable=SC2034  # because the scripts read the options
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

# parse OPTIONS FLAGS ARGUMENT...: sets the variables of options, 1 for flags, and `rest` to the arguments after --.
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
        [[ $flags != *" ${option#--} "* ]] || fail "$option must have no value, got $(printf %q "$2")"
        continue
        ;;
    esac
    option=${1#--}
    if [[ ! $1 =~ ^--[a-z-]+$ ]]; then
      fail "arguments must be options, got $(printf %q "$1"): --help lists them"
    elif [[ $flags == *" $option "* ]]; then
      printf -v "${option//-/_}" 1
      shift
    elif [[ $options == *" $option "* ]]; then
      (($# > 1)) || fail "--$option must have a value, got none"
      if [[ $option == env ]]; then env+=("$2"); else printf -v "${option//-/_}" %s "$2"; fi
      shift 2
    else
      fail "options must be of this script, got --$option: --help lists them"
    fi
  done
}

# check OPTION...: fails unless every option has a value of its form; OPTION? may also be empty.
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
      to) form='[^-:][^:]*' words='a folder, without a colon' ;; # because scp reads a machine's name before a colon
      *) fail "no form for $option" ;;
    esac
    value=${option%\?}
    value=${!value}
    [[ $option != *\? || -n $value ]] || continue
    option=--${option%\?}
    [[ $option != --module ]] || option='the word after --' # because the module has no option
    [[ -n $value ]] || fail "${option//_/-} must be $words, got none"
    [[ $value =~ ^($form)$ ]] || fail "${option//_/-} must be $words, got $(printf %q "$value")"
  done
}

# Checks the slice's name and place, and sets `where` to gcloud's options for the place.
place() {
  check name zone project? slices
  where=("--zone=$zone")
  [[ -z $project ]] || where+=("--project=$project")
}

nothing_after() { ((${#rest[@]} == 0)) || fail "-- must end the command, got $(printf %q "${rest[0]}") after it"; }

need_gcloud() {
  [[ -n $dry_run ]] || command -v gcloud >/dev/null ||
    fail 'gcloud must be on PATH, got none: install it (https://cloud.google.com/sdk/docs/install)'
}

show() { { printf '+' && printf ' %q' "$@" && printf '\n'; } >&2; }

# Prints a command in the shell's syntax, and runs it unless this is a dry run.
do_() {
  show "$@"
  [[ -n $dry_run ]] || "$@"
}

# tpu ssh|scp SLICE WORKER OPERAND...: on a single slice, or on slices (a number or all) of the queued resource.
tpu() {
  local verb=$1 node=$2 on=$3
  shift 3
  if ((slices > 1)); then
    do_ gcloud compute tpus queued-resources "$verb" "$@" "${where[@]}" "--node=$node" "--worker=$on"
  else
    do_ gcloud compute tpus tpu-vm "$verb" "$@" "${where[@]}" "--worker=$on"
  fi
}

# remote SLICE WORKER WORD...: runs a command on workers.  Their shell reads every word as one literal argument.
remote() {
  local node=$1 on=$2 command
  shift 2
  printf -v command ' %q' "$@"
  tpu ssh "$node" "$on" "$name" "--command=${command# }"
}
