#!/usr/bin/env bash
# Runs a study on several TPU slices at once, each with its --shard; tpu_pod.sh does the work for every one of them.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: bash launch/tpu_study.sh ACTION --slices=N --name=NAME [OPTIONS OF tpu_pod.sh] [-- STUDY OPTIONS]

The actions create, run, status, logs, fetch and delete are those of tpu_pod.sh, on the slices NAME-0 to NAME-(N-1).
`run` gives slice i the command `python -m precision_scaling.study STUDY OPTIONS --shard=i/N`, replaces slices that are
preempted, and waits for all. With --workdir=gs://BUCKET/PATH among the STUDY OPTIONS all slices work there, and the
last to end makes runs.csv of all rows. With --results=gs://BUCKET/PATH each works in a directory and keeps a copy
there, `fetch` brings them together in DIR, and the study once more here makes runs.csv.

  --slices=N    how many slices
  --name=NAME   what their names begin with (or set TPU_NAME)
  STUDY OPTIONS --config=FILE --workdir=DIR --config.key=value ..., as in `python -m precision_scaling.study --help`
  --dry_run     print the commands of all slices instead of running them, wherever it stands
  --help        this text
  all others    see `bash launch/tpu_pod.sh --help`

Example: bash launch/tpu_study.sh run --name=paper --slices=8 --project=PROJECT --zone=us-east5-a \
             --delete_when_done -- --config=configs/paper.py --workdir=gs://BUCKET/paper
TEXT
}

# shellcheck source=launch/arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"
slices="" name="${TPU_NAME:-}" for_pod=()
read_arguments "$@"
for option in ${options[@]+"${options[@]}"}; do
  case "$option" in
    --slices=*) slices="${option#*=}" ;;
    --name=*) name="${option#*=}" ;;
    *) for_pod+=("$option") ;;
  esac
done
whole_number --slices "$slices" 1 1000
[ -n "$name" ] || die "--name is missing (or set TPU_NAME)"
if [ "$action" = run ]; then
  [ ${#arguments[@]} -gt 0 ] || die "run: the study is missing, e.g. -- --config=configs/paper.py --workdir=runs/paper"
  for argument in "${arguments[@]}"; do study_option "$argument"; done
fi

pod="$(dirname "${BASH_SOURCE[0]}")/tpu_pod.sh"
slice() { # slice I [OPTIONS]
  local command=()
  if [ "$action" = run ]; then
    command=(-- -m precision_scaling.study "${arguments[@]}" --shard="$1/$slices")
  fi
  bash "$pod" "$action" --name="$name-$1" "${@:2}" ${for_pod[@]+"${for_pod[@]}"} ${command[@]+"${command[@]}"}
}

# What is wrong with the options of one is wrong with those of all, and said once, before any of them begins.
slice "$((slices - 1))" --dry_run >/dev/null
if $dry_run; then
  for ((i = 0; i < slices; i++)); do slice "$i" --dry_run; done
  exit
fi
need_gcloud
if [ "$action" = fetch ]; then # all write to one directory: one after the other
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
