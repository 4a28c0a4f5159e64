# What the two batch scripts beside this file do alike. They source it.
# shellcheck shell=bash
[ "${BASH_SOURCE[0]}" != "$0" ] || exec sed -n '1s/^# //p' "$0"
# shellcheck source=launch/arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

python="${PYTHON:-.venv/bin/python}"

check_python() {
  command -v -- "$python" >/dev/null || die "$python: no such file in $PWD; make it with: bash launch/setup.sh cuda"
}

# requeue_when_stopped JOB COMMAND ...: runs the command and ends with its status. At SIGTERM, which only this shell is
# sent, calls pass_on_stop, waits for the command to save and end, and puts the job back into the queue.
requeue_when_stopped() {
  local job="$1" asked_to_stop=false running="" status
  shift
  trap 'asked_to_stop=true; [ -z "$running" ] || pass_on_stop' TERM
  "$@" &
  running=$!
  ! $asked_to_stop || pass_on_stop # before there was anything to stop
  status=0
  wait_for "$running" || status=$?
  if $asked_to_stop && [ "$status" -ne 0 ]; then
    echo "stopped before it was done: back into the queue" >&2
    scontrol requeue "$job"
    sleep 60 # SLURM ends this script
  fi
  exit "$status"
}
