# Sourced by the scripts beside it: a virtual environment in .venv with this project installed, made once.
# PYTHON names the interpreter (3.11 or newer); PRECISION_SCALING_EXTRAS adds extras of setup.py, e.g. "cuda".
cd "$(dirname "${BASH_SOURCE[0]}")/.."

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
