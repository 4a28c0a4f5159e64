#!/usr/bin/env bash
# From nothing to a report, on this machine's CPU or the GPU that is there.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

usage() {
  cat <<'TEXT'
Usage: bash launch/local.sh [OPTIONS] [WORKDIR] [--config.key=value ...]

Sets up .venv, trains and quantizes the models of a study in WORKDIR, fits the laws to the losses and writes
WORKDIR/report. Run it again and it does only what is missing.

  WORKDIR             directory of the study: runs/study_cpu, if not given
  --config=FILE       the study: configs/study_cpu.py, if not given (or set CONFIG)
  --config.key=value  any option in it, e.g. --config.study.lanes=4
  --only=REGEX, --rows=FILE, --time_limit=MINUTES, --profile=N
                      as in `python -m precision_scaling.study --help`
  --workers=N         processes that share the study: 1 on a GPU, 2 on a CPU, if not given (or set WORKERS)
  --dry_run           print the commands instead of running them
  --help              this text

Relative paths begin at the project's directory, wherever this is called. PRECISION_SCALING_EXTRAS names the parts that
are installed (see launch/setup.sh --help): cuda where there is an NVIDIA GPU, else none, if not set.

Example: bash launch/local.sh runs/mine --config=my_study.py --config.train.batch_size=32
TEXT
}

own_options "$@"
config="${CONFIG:-configs/study_cpu.py}" workers="${WORKERS:-}" extras="${PRECISION_SCALING_EXTRAS:-}"
workdirs=() overrides=()
[ -z "$workers" ] || whole_number WORKERS "$workers" 1 1000
for word in ${words[@]+"${words[@]}"}; do
  case "$word" in
    --config=*) config="${word#*=}" ;;
    --workers=*) workers="${word#*=}" && whole_number --workers "$workers" 1 1000 ;;
    --workdir=*) workdirs+=("${word#*=}") ;;
    -*) study_option "$word" && overrides+=("$word") ;;
    *) workdirs+=("$word") ;;
  esac
done
[ ${#workdirs[@]} -le 1 ] || die "${workdirs[1]}: allowed is one workdir, and ${workdirs[0]} is given"
workdir="${workdirs[0]-runs/study_cpu}"
directory WORKDIR "$workdir"
one_line "$config" "${PYTHON:-}"
[ -f "${config%%:*}" ] || die "--config=$config: no such file in $PWD"
check_extras PRECISION_SCALING_EXTRAS "$extras"

if [ -z "$extras" ] && command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  extras="cuda"
fi
# Small models keep one core busy each: on a CPU, two workers share the study. A GPU takes one.
if [ -z "$workers" ]; then
  workers=2
  [[ ",$extras," != *,cuda,* && "$(getconf _NPROCESSORS_ONLN)" != 1 ]] || workers=1
fi
study=(.venv/bin/python -m precision_scaling.study --config="$config" --workdir="$workdir" ${overrides[@]+"${overrides[@]}"})
report=(.venv/bin/python -m analysis.report --runs="$workdir/runs.csv" --out="$workdir/report")
if $dry_run; then
  quoted bash launch/setup.sh ${extras:+"$extras"}
  for ((i = 1; i <= workers; i++)); do quoted "${study[@]}" --shard="$((i % workers))/$workers"; done
  [ "$workers" -eq 1 ] || quoted "${study[@]}"
  quoted "${report[@]}"
  exit
fi

ensure_environment "$extras"
mkdir -p "$workdir"

pids=()
# They save what they have; whoever calls this again would otherwise meet them.
trap '[ ${#pids[@]} -eq 0 ] || { kill "${pids[@]}" 2>/dev/null || true; wait; }' EXIT
for ((i = 1; i < workers; i++)); do
  "${study[@]}" --shard="$i/$workers" >"$workdir/worker$i.log" 2>&1 &
  pids+=($!)
done
"${study[@]}" --shard="0/$workers"
for ((i = 1; i < workers; i++)); do
  echo "waiting for worker $i (its log: $workdir/worker$i.log)"
  status=0
  wait "${pids[i - 1]}" || status=$?
  if [ "$status" -ne 0 ]; then
    tail -n 3 "$workdir/worker$i.log" >&2
    exit "$status"
  fi
done
pids=()
[ "$workers" -eq 1 ] || "${study[@]}" # nothing is left to do but to gather all rows
"${report[@]}"
