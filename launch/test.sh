#!/usr/bin/env bash
# Sets up .venv and runs the tests.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

usage() {
  cat <<'TEXT'
Usage: bash launch/test.sh [--dry_run] [PYTEST ARGUMENTS]

Sets up .venv and runs the tests on two processes. Whatever is not listed here is for pytest, and what follows -- is in
any case: its own help is `bash launch/test.sh -- --help`.

  -m "not slow"   only the fast tests
  -n 0            one process
  tests/test_X.py only the tests of a file
  --dry_run       print the commands instead of running them
  --help          this text

PRECISION_SCALING_EXTRAS names more parts to install (see launch/setup.sh --help), e.g. transformers to compare with.

Example: bash launch/test.sh -m "not slow" -x
TEXT
}

own=() for_pytest=()
while [ $# -gt 0 ]; do
  if [ "$1" = -- ]; then
    for_pytest=("${@:2}")
    break
  fi
  own+=("$1") && shift
done
own_options ${own[@]+"${own[@]}"}
one_line ${for_pytest[@]+"${for_pytest[@]}"} "${PYTHON:-}"
extras="${PRECISION_SCALING_EXTRAS:-}"
check_extras PRECISION_SCALING_EXTRAS "$extras"
extras="dev${extras:+,$extras}"
command=(.venv/bin/python -m pytest -n 2 --dist=worksteal ${words[@]+"${words[@]}"} ${for_pytest[@]+"${for_pytest[@]}"})
if $dry_run; then
  quoted bash launch/setup.sh "$extras" && quoted "${command[@]}"
  exit
fi
ensure_environment "$extras"
exec "${command[@]}"
