#!/usr/bin/env bash
# Makes the virtual environment .venv with this project in it. The scripts beside it source this file for
# ensure_environment, and find themselves in the project's directory.
# shellcheck source=launch/arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

EXTRAS="cuda tpu transformers beam tensorboard wandb text gcs dev" # of setup.py

# check_extras NAME EXTRAS: pip would only warn of one that there is not.
check_extras() {
  local one="(${EXTRAS// /|})"
  [[ -z "$2" || "$2" =~ ^$one(,$one)*$ ]] || die "$1=$2: allowed are ${EXTRAS// /, }, separated by commas"
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.13 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    elif [ -n "${PYTHON:-}" ]; then # another than the one that was asked for would be a surprise
      echo "error: PYTHON=$PYTHON: allowed is an interpreter of Python 3.11 or newer" >&2
      return 2
    fi
  done
  echo "error: Python 3.11 or newer is needed; set PYTHON to one" >&2
  return 2
}

setup_commands() { # setup_commands PYTHON EXTRAS: sets two arrays
  make=("$1" -m venv .venv)
  install=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${2:+[$2]}")
}

# ensure_environment EXTRAS. Every step says itself what follows when it fails: where a caller looks at the status of a
# function, bash does not end it at the first command that fails.
ensure_environment() {
  local extras="$1" stamp python version sum make install
  python="$(find_python)" || return
  version="$("$python" --version)" && sum="$(cksum <setup.py)" || return
  # What is installed depends on these alone; an editable install needs no second one when the code changes.
  stamp="$extras $version $sum"
  if [ -x .venv/bin/python ] && [ "$(cat .venv/installed 2>/dev/null)" = "$stamp" ]; then
    return
  fi
  echo "setting up .venv (once, a minute or two) ..."
  setup_commands "$python" "$extras"
  "${make[@]}" && "${install[@]}" && echo "$stamp" >.venv/installed
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  set -euo pipefail
  usage() {
    cat <<TEXT
Usage: bash launch/setup.sh [--dry_run] [EXTRAS]

Makes the virtual environment .venv in the project's directory and installs the project into it. Run again, it does
nothing until setup.py, the interpreter or EXTRAS change. The other scripts of launch/ call it by themselves; SLURM's
need it once, before.

  EXTRAS      optional parts, separated by commas: ${EXTRAS// /, }
  --dry_run   print the commands instead of running them
  --help      this text

PYTHON names the interpreter to begin with, 3.11 or newer; without, the first one found of python3, python3.12, ...

Example: bash launch/setup.sh cuda
TEXT
  }
  own_options "$@"
  one_line "${PYTHON:-}"
  extras=""
  for word in ${words[@]+"${words[@]}"}; do
    case "$word" in
      -*) die "$word: no such option (--help)" ;;
      *) [ -z "$extras" ] || die "$word: allowed is one list of extras, e.g. $extras,$word" ;;
    esac
    extras="$word"
  done
  check_extras EXTRAS "$extras"
  if $dry_run; then
    setup_commands "${PYTHON:-python3}" "$extras"
    quoted "${make[@]}" && quoted "${install[@]}"
    exit
  fi
  ensure_environment "$extras"
fi
