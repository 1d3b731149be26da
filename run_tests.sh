#!/usr/bin/env bash
# Runs the test suite; makes the Python environment if there is none.
set -euo pipefail

case ${1:-} in
  -h | --help)
    cat <<'TEXT'
usage: ./run_tests.sh [PYTEST ARGUMENTS]

Runs pytest in the repository root with these arguments, by default on all of tests/, a process for each core:

  ./run_tests.sh -x tests/kernels
  ./run_tests.sh -n 0 --pdb                one process, which --pdb needs
  ADASPLASH_DATA=DIR ./run_tests.sh        also the tests that need real data

The active virtual or conda environment is used if it has what is needed, else .venv is made (once);
ADASPLASH_VENV names another folder for it.
TEXT
    exit 0 ;;
esac

cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
. tasks/environment.sh
use_environment experiments,dev
exec "$PYTHON" -m pytest -n auto --dist worksteal "$@"
