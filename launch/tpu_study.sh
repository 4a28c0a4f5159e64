#!/usr/bin/env bash
# Runs a study on several TPU slices at once, each with its --shard; tpu_pod.sh does the work for every one of them.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: bash launch/tpu_study.sh ACTION --slices=N --name=NAME [OPTIONS OF tpu_pod.sh] [-- --config=FILE --workdir=DIR ...]

The actions create, run, status, logs, fetch and delete are those of tpu_pod.sh, on the slices NAME-0 to NAME-(N-1).
`run` gives slice i the command `python -m precision_scaling.study --config=FILE --workdir=DIR ... --shard=i/N`, replaces
slices that are preempted, and waits for all. With --results=gs://BUCKET/PATH all slices keep their results there, and
`fetch` brings them together in DIR; run the study once more here to make runs.csv of all rows.
--dry_run prints the commands of all slices.
TEXT
}

# shellcheck source=launch/tpu_arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu_arguments.sh"
slices="" name="${TPU_NAME:-}" for_pod=() dry_run=false
read_arguments "$@"
for option in ${options[@]+"${options[@]}"}; do
  case "$option" in
    --slices=*) slices="${option#*=}" ;;
    --name=*) name="${option#*=}" ;;
    *) for_pod+=("$option") ;;
  esac
  [ "$option" != --dry_run ] || dry_run=true
done
[[ "$slices" =~ ^[1-9][0-9]*$ ]] || die "--slices=$slices: allowed is a whole number from 1 up"
[ -n "$name" ] || die "--name is missing (or set TPU_NAME)"
if [ "$action" = run ]; then
  [ ${#arguments[@]} -gt 0 ] || die "run: the study is missing, e.g. -- --config=configs/paper.py --workdir=runs/paper"
  for argument in "${arguments[@]}"; do
    [[ "$argument" != --shard=* ]] || die "$argument: every slice is given its own"
  done
fi

pod="$(dirname "${BASH_SOURCE[0]}")/tpu_pod.sh"
slice() { # slice I
  local command=()
  if [ "$action" = run ]; then
    command=(-- -m precision_scaling.study "${arguments[@]}" --shard="$1/$slices")
  fi
  bash "$pod" "$action" --name="$name-$1" ${for_pod[@]+"${for_pod[@]}"} ${command[@]+"${command[@]}"}
}

# Fetching, all write to one directory: one after the other.
if $dry_run || [ "$action" = fetch ]; then
  for ((i = 0; i < slices; i++)); do slice "$i"; done
  exit
fi
pids=() failed=()
trap 'kill "${pids[@]}" 2>/dev/null || true' INT TERM
for ((i = 0; i < slices; i++)); do
  slice "$i" &
  pids+=($!)
done
for ((i = 0; i < slices; i++)); do
  wait "${pids[i]}" || failed+=("$name-$i")
done
[ ${#failed[@]} -eq 0 ] || die "$action failed on ${failed[*]}; their messages are above"
