#!/usr/bin/env bash
# Sets up .venv and runs the tests. Usage: bash launch/test.sh [PYTEST ARGUMENTS], e.g. -m "not slow" or -n 0 for one process
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
ensure_environment "dev${PRECISION_SCALING_EXTRAS:+,$PRECISION_SCALING_EXTRAS}"
exec .venv/bin/python -m pytest -n 2 --dist=worksteal "$@"
