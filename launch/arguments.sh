# How the scripts beside this file read their command lines. They source it and define usage.
# shellcheck shell=bash
[ "${BASH_SOURCE[0]}" != "$0" ] || exec sed -n '1s/^# //p' "$0"

die() { # one line, whatever stands in it
  local LC_ALL=C message="$*"
  printf 'error: %s\n' "${message//[[:cntrl:]]/ }" >&2
  exit 2
}

# own_options "$@": for --help anywhere on the line prints the usage and ends; sets dry_run, and words to all the others.
# shellcheck disable=SC2034
own_options() {
  local word
  dry_run=false words=()
  for word in "$@"; do
    case "$word" in
      -h | --help) usage && exit ;;
      --dry_run | --dry-run) dry_run=true ;;
      *) words+=("$word") ;;
    esac
  done
  one_line "$@"
}

# one_line WORD ...: a line break would end a command of a shell elsewhere, and a line of what a dry run prints.
one_line() {
  local LC_ALL=C word
  for word in "$@"; do
    [[ "$word" != *[[:cntrl:]]* ]] || die "$word: line breaks and control characters are not allowed"
  done
}

# whole_number NAME VALUE LEAST MOST. To be asked before any arithmetic: that would run what stands in $( ) or [ ].
whole_number() {
  local LC_ALL=C
  { [[ "$2" =~ ^(0|[1-9][0-9]{0,8})$ ]] && [ "$2" -ge "$3" ] && [ "$2" -le "$4" ]; } ||
    die "$1=$2: allowed is a whole number from $3 to $4"
}

# directory NAME VALUE: no option by mistake, nothing that one program expands and another does not.
directory() {
  case "$2" in
    "" | -* | "~"* | *://*) die "$1=$2: allowed is the path of a directory, without ~ or gs://" ;;
  esac
}

# study_option WORD: whatever else a study is asked to do would be said only when it begins, hours later or on a slice.
study_option() {
  case "$1" in
    --config=?* | --config.?*=* | --workdir=?* | --only=* | --rows=* | --time_limit=* | --time-limit=* | --profile=* | --distributed) ;;
    --shard | --shard=*) die "$1: every process is given its own" ;;
    --config | --config.* | --workdir | --only | --rows | --time_limit | --profile) die "$1: its value is missing: $1=VALUE" ;;
    *) die "$1: allowed are --config=FILE, --config.key=value, --workdir, --only, --rows, --time_limit, --profile, --distributed" ;;
  esac
}

quoted() { # its arguments as words of a shell, on one line
  local LC_ALL=C line="" word quote="'\\''"
  for word in "$@"; do
    [[ "$word" =~ ^[A-Za-z0-9_./=:,@%+-]+$ ]] || word="'${word//\'/$quote}'"
    line="$line $word"
  done
  printf '%s\n' "${line# }"
}

# read_arguments ACTION [OPTIONS] [-- ARGUMENTS], of the scripts for TPU slices: sets dry_run, action, and the arrays
# options and arguments.
# shellcheck disable=SC2034
read_arguments() {
  own_options "$@"
  options=() arguments=() action="${words[0]:-}"
  case "$action" in
    create | run | status | logs | fetch | delete) ;;
    "") die "an action is missing: create, run, status, logs, fetch or delete (--help)" ;;
    *) die "$action: allowed is create, run, status, logs, fetch or delete (--help)" ;;
  esac
  local i
  for ((i = 1; i < ${#words[@]}; i++)); do
    if [ "${words[i]}" = -- ]; then
      arguments=("${words[@]:i + 1}")
      break
    fi
    options+=("${words[i]}")
  done
  [ ${#arguments[@]} -eq 0 ] || [ "$action" = run ] || die "${arguments[0]}: $action takes no command"
}

# wait_for PID: waits for a child and returns its status. A signal ends `wait` before the child ends.
wait_for() {
  local status=0
  while true; do
    status=0
    wait "$1" || status=$?
    kill -0 "$1" 2>/dev/null || return "$status"
  done
}

need_gcloud() {
  command -v gcloud >/dev/null || die "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
}
