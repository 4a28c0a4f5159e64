#!/usr/bin/env bash
# The part of tpu_pod.sh on a TPU worker: one command at a time, in the background, with its log and exit status in job/.
# Usage: tpu_worker.sh start RESULTS WORKDIR PYTHON ARGUMENTS | is_running | status | logs LINES | stop
# RESULTS is gs://BUCKET/PATH, where WORKDIR is kept, or empty. PYTHON names an interpreter that has the project already.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p job

is_running() { [ -e job/pid ] && kill -0 "$(cat job/pid)" 2>/dev/null; }

# Files of a study never change once they are written and have names of their own: copies of many workers lie side by side.
copy_out() {
  [ -z "$1" ] || gcloud storage rsync --recursive "$2" "$1" || echo "could not copy $2 to $1: trying again later" >&2
}

job() { # job RESULTS WORKDIR PYTHON ARGUMENTS
  local results="$1" workdir="$2" python="${PYTHON:-}" command copier="" status=0
  shift 2
  if [ -z "$python" ]; then
    source launch/setup.sh
    ensure_environment tpu
    python=.venv/bin/python
  fi
  trap : TERM # for the command, which saves and ends; what it saved is copied out
  if [ -n "$results" ]; then
    mkdir -p "$workdir"
    # To rsync, a path that nothing was copied to yet is an error.
    ! gcloud storage ls "$results" >/dev/null 2>&1 || gcloud storage rsync --recursive "$results" "$workdir"
    while sleep "${COPY_SECONDS:-60}"; do copy_out "$results" "$workdir"; done &
    copier=$!
  fi
  "$python" "$@" &
  command=$!
  while kill -0 "$command" 2>/dev/null; do # a signal ends `wait` before the command ends
    status=0
    wait "$command" || status=$?
  done
  [ -z "$copier" ] || kill "$copier" 2>/dev/null || true
  copy_out "$results" "$workdir"
  return "$status"
}

action="${1:-}"
shift || true
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
    # A session of its own outlives this connection.
    setsid bash launch/tpu_worker.sh job "$@" </dev/null >job/log 2>&1 &
    echo $! >job/pid
    ;;
  job)
    trap : TERM # the same here: it outlives the command and says how it ended
    status=0
    (job "$@") || status=$?
    echo "$status" >job/status
    ;;
  is_running) is_running ;;
  status)
    if [ -e job/status ]; then
      case "$(cat job/status)" in 0) answer="done" ;; *) answer="failed with status $(cat job/status)" ;; esac
    elif is_running; then
      answer=running
    elif [ -e job/pid ]; then
      answer=stopped
    else
      answer="no command"
    fi
    echo "worker $(hostname): $answer"
    ;;
  logs) tail -n "${1:-50}" job/log | sed "s/^/$(hostname): /" ;;
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
  *)
    echo "error: $action: allowed is start, is_running, status, logs or stop" >&2
    exit 2
    ;;
esac
