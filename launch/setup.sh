#!/usr/bin/env bash
# A virtual environment in .venv with this project installed, made once. Usage: bash launch/setup.sh [EXTRAS OF setup.py],
# e.g. cuda or tpu. The scripts beside it source this file. PYTHON names the interpreter (3.11 or newer).
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

find_python() {
  for candidate in "${PYTHON:-}" python3 python3.12 python3.11 python3.13 python; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or newer is needed; set PYTHON to one" >&2
  return 1
}

ensure_environment() { # ensure_environment EXTRAS
  local extras="$1" stamp python
  python="$(find_python)"
  # What is installed depends on these alone; an editable install needs no second one when the code changes.
  stamp="$extras $("$python" --version) $(cksum <setup.py)"
  if [ -x .venv/bin/python ] && [ "$(cat .venv/installed 2>/dev/null)" = "$stamp" ]; then
    return
  fi
  echo "setting up .venv (once, a minute or two) ..."
  "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}"
  echo "$stamp" >.venv/installed
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  set -euo pipefail
  ensure_environment "${1:-}"
fi
