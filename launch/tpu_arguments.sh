# What the scripts for TPU slices read their command lines with. Sourced by tpu_pod.sh and tpu_study.sh, which define usage.
# shellcheck shell=bash

die() {
  echo "error: $*" >&2
  exit 2
}

# read_arguments ACTION [OPTIONS] [-- ARGUMENTS]: sets action, and the arrays options and arguments.
# shellcheck disable=SC2034
read_arguments() {
  action="${1:-}" options=() arguments=()
  case "$action" in
    create | run | status | logs | fetch | delete) shift ;;
    -h | --help) usage && exit ;;
    "") die "an action is missing: create, run, status, logs, fetch or delete (--help)" ;;
    *) die "$action: allowed is create, run, status, logs, fetch or delete (--help)" ;;
  esac
  while [ $# -gt 0 ]; do
    case "$1" in
      -h | --help) usage && exit ;;
      --)
        shift
        arguments=("$@")
        break
        ;;
      *) options+=("$1") ;;
    esac
    shift
  done
}
