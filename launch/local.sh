#!/usr/bin/env bash
# From nothing to a report, on this machine's CPU or the GPU that is there: sets up .venv, trains and quantizes the
# study of configs/study_cpu.py, fits the laws and writes a report. Run it again and it does only what is missing.
# Usage: bash launch/local.sh [--dry_run] [WORKDIR] [--config.key=value ...]   --dry_run prints the commands instead;
# CONFIG=FILE chooses another study, WORKERS=N how many processes share it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

dry_run=false
case "${1:-}" in
  -h | --help) sed -n 's/^# //; 2,5p' launch/local.sh && exit ;;
  --dry_run) dry_run=true && shift ;;
esac
workdir="runs/study_cpu"
if [ $# -gt 0 ] && [[ "$1" != --* ]]; then
  workdir="$1"
  shift
fi
config="${CONFIG:-configs/study_cpu.py}"

extras="${PRECISION_SCALING_EXTRAS:-}"
if [ -z "$extras" ] && command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  extras="cuda"
fi
# Small models keep one core busy each: on a CPU, two workers share the study. A GPU takes one.
workers="${WORKERS:-$([ "$extras" = cuda ] || [ "$(getconf _NPROCESSORS_ONLN)" -lt 2 ] && echo 1 || echo 2)}"
study=(.venv/bin/python -m precision_scaling.study --config="$config" --workdir="$workdir")
report=(.venv/bin/python -m analysis.report --runs="$workdir/runs.csv" --out="$workdir/report")
if $dry_run; then
  show() { echo "$1$(printf ' %q' "${@:2}")"; }
  echo "bash launch/setup.sh${extras:+ $extras}"
  for ((i = 1; i <= workers; i++)); do show "${study[@]}" --shard="$((i % workers))/$workers" "$@"; done
  [ "$workers" -eq 1 ] || show "${study[@]}" "$@"
  show "${report[@]}"
  exit
fi

ensure_environment "$extras"
mkdir -p "$workdir"

pids=()
trap '[ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2>/dev/null || true' EXIT
for ((i = 1; i < workers; i++)); do
  "${study[@]}" --shard="$i/$workers" "$@" >"$workdir/worker$i.log" 2>&1 &
  pids+=($!)
done
"${study[@]}" --shard="0/$workers" "$@"
for ((i = 1; i < workers; i++)); do
  echo "waiting for worker $i (its log: $workdir/worker$i.log)"
  if ! wait "${pids[i - 1]}"; then
    tail -n 3 "$workdir/worker$i.log" >&2
    exit 1
  fi
done
pids=()
[ "$workers" -eq 1 ] || "${study[@]}" "$@" # nothing is left to do but to gather all rows
"${report[@]}"
