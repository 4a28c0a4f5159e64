#!/usr/bin/env bash
# The part of tpu_pod.sh on a TPU worker: one command at a time, in the background, with its log and exit status in job/.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: bash launch/tpu_worker.sh ACTION, on a TPU worker; tpu_pod.sh calls it there.

  start RESULTS WORKDIR PYTHON ARGUMENTS  begin `python PYTHON ARGUMENTS`; RESULTS is gs://BUCKET/PATH, where WORKDIR is
                                          kept, or empty
  is_running                              whether it still runs, as the exit status
  status                                  running, done, failed, stopped or no command
  logs [LINES]                            its last lines, 50 if not given, and the newest line of metrics in its workdir
  stop                                    let it save and end; after a minute, kill it
  --dry_run                               print the commands of an action instead of running them
  --help                                  this text

PYTHON names an interpreter that has the project already; without, .venv is made.

Example: bash launch/tpu_worker.sh start gs://BUCKET/w runs/w -m precision_scaling.train --config=FILE --workdir=runs/w
TEXT
}

# shellcheck source=launch/arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

is_running() { [ -e job/pid ] && kill -0 "$(cat job/pid)" 2>/dev/null; }

# Files of a study never change once they are written and have names of their own: copies of many workers lie side by side.
copy_out() {
  [ -z "$1" ] || gcloud storage rsync --recursive "$2" "$1" || echo "could not copy $2 to $1: trying again later" >&2
}

# copy_in RESULTS WORKDIR. To rsync, a path that nothing was copied to yet is an error; any other is one to us, too: a
# command that began without the results that there are would begin anew.
copy_in() {
  local answer
  if answer="$(gcloud storage ls "$1" 2>&1)"; then
    gcloud storage rsync --recursive "$1" "$2"
  else
    grep -q "matched no objects" <<<"$answer" || { echo "$answer" >&2 && return 1; }
  fi
}

metrics() { # metrics WORKDIR: the last line of the metrics.jsonl, or of a part of one, that was written last
  local file=""
  if [[ "$1" != gs://* ]]; then
    file="$(find "$1/runs" -name metrics.jsonl -printf '%T@ %p\n' 2>/dev/null | sort -n | tail -n 1 | cut -d ' ' -f 2-)"
    [ -z "$file" ] || tail -n 1 "$file" | shown "${file##*/runs/}: "
  elif [[ "$(hostname)" != *-w-[1-9]* ]]; then # all workers of a slice have the same: worker 0 lists them
    file="$(gcloud storage ls --long "$1/runs/**.jsonl" 2>/dev/null | grep gs:// | sort -b -k 2,2 | sed 's/.* gs:/gs:/' | tail -n 1)"
    [ -z "$file" ] || gcloud storage cat "$file" | tail -n 1 | shown "${file##*/runs/}: "
  fi
}

shown() { sed "s|^|$(hostname): ${1:-}|"; }

extras() { # of setup.py, for a command
  case " $* " in *" --workdir=gs://"*) echo tpu,gcs ;; *) echo tpu ;; esac
}

job() { # job RESULTS WORKDIR PYTHON ARGUMENTS
  local results="$1" workdir="$2" python="${PYTHON:-}" command copier="" status=0
  shift 2
  # Every step ends this by itself: bash does not where the status of a function is looked at.
  if [ -z "$python" ]; then
    # shellcheck source=launch/setup.sh
    source launch/setup.sh
    ensure_environment "$(extras "$@")" || return
    python=.venv/bin/python
  fi
  trap : TERM # for the command, which saves and ends; what it saved is copied out
  if [ -n "$results" ]; then
    mkdir -p "$workdir" && copy_in "$results" "$workdir" || return
    while sleep "${COPY_SECONDS:-60}"; do copy_out "$results" "$workdir"; done &
    copier=$!
  fi
  "$python" "$@" &
  command=$!
  wait_for "$command" || status=$?
  [ -z "$copier" ] || kill "$copier" 2>/dev/null || true
  copy_out "$results" "$workdir"
  return "$status"
}

show() { # what an action would run
  local pid
  pid="$(cat job/pid 2>/dev/null || echo PID)"
  case "$action" in
    start | job)
      [ -n "${PYTHON:-}" ] || quoted bash launch/setup.sh "$(extras "${@:3}")"
      [ -z "$1" ] || quoted gcloud storage rsync --recursive "$1" "$2"
      quoted "${PYTHON:-.venv/bin/python}" "${@:3}"
      [ -z "$1" ] || quoted gcloud storage rsync --recursive "$2" "$1"
      ;;
    is_running) quoted kill -0 "$pid" ;;
    status) quoted cat job/status ;;
    logs) quoted tail -n "$1" job/log ;;
    stop) quoted kill -TERM -- "-$pid" ;;
  esac
}

own_options "$@"
action="${words[0]:-}"
set -- ${words[@]+"${words[@]:1}"}
case "$action" in
  start | job) [ $# -ge 3 ] || die "$action: allowed is $action RESULTS WORKDIR PYTHON ARGUMENTS" ;;
  logs) whole_number LINES "${1:-50}" 0 1000000 && set -- "${1:-50}" ;;
  is_running | status | stop) ;;
  *) die "$action: allowed is start, is_running, status, logs or stop (--help)" ;;
esac
[[ "${COPY_SECONDS:-60}" =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "COPY_SECONDS=$COPY_SECONDS: allowed is a number of seconds"
if $dry_run; then
  show "$@"
  exit
fi
mkdir -p job
case "$action" in
  start)
    asked="$(printf '%s\0' "$@" | cksum)"
    if is_running; then
      [ "$asked" != "$(cat job/command)" ] || exit 0
      echo "error: $(hostname) runs another command; wait for it, or give the slice back" >&2
      exit 1
    fi
    rm -f job/status
    echo "$asked" >job/command
    printf '%s\n' "$2" >job/workdir
    # A session of its own outlives this connection.
    setsid bash launch/tpu_worker.sh job "$@" </dev/null >job/log 2>&1 &
    echo $! >job/pid
    ;;
  job)
    trap : TERM # the same here: it outlives the command and says how it ended
    status=0
    (job "$@") || status=$?
    echo "$status" >job/ended && mv job/ended job/status # whole, whenever it is looked at
    ;;
  is_running) is_running ;;
  status)
    running=false # asked first: a job that ends in between has said how
    ! is_running || running=true
    if [ -e job/status ]; then
      case "$(cat job/status)" in 0) answer="done" ;; *) answer="failed with status $(cat job/status)" ;; esac
    elif $running; then
      answer=running
    elif [ -e job/pid ]; then
      answer=stopped
    else
      answer="no command"
    fi
    echo "worker $(hostname): $answer"
    ;;
  logs)
    tail -n "$1" job/log | shown
    metrics "$(cat job/workdir)" || true # a run that has just begun has none
    ;;
  stop)
    is_running || exit 0
    pid="$(cat job/pid)"
    kill -TERM -- "-$pid" 2>/dev/null || true
    for ((i = 0; i < 60; i++)); do
      is_running || exit 0
      sleep 1
    done
    kill -KILL -- "-$pid"
    ;;
esac
