#!/usr/bin/env bash
# From nothing to a report, on this machine's CPU or the GPU that is there: sets up .venv, trains and quantizes the
# study of configs/study_cpu.py, fits the laws and writes a report. Run it again and it does only what is missing.
# Usage: bash launch/local.sh [WORKDIR] [--config.key=value ...]     CONFIG=FILE chooses another study.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

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
ensure_environment "$extras"

.venv/bin/python -m precision_scaling.study --config="$config" --workdir="$workdir" "$@"
.venv/bin/python -m analysis.report --runs="$workdir/runs.csv" --out="$workdir/report"
