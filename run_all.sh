#!/usr/bin/env bash
# Runs every table and figure at a scale, renders the results; makes the Python environment if there is none.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: ./run_all.sh [--scale smoke|lab|paper] [--only PATTERN] [--data-root DIR] [--gpus N] [--force]

Runs the experiments of configs/, then renders results/ (tables, figures, the index results/README.md).

  --scale SCALE      smoke (default): everything end to end on small data, minutes on a CPU;
                     lab: real data, reduced budget, one GPU; paper: the papers' own settings
  --only PATTERN     only the experiments that match, e.g. 'adasplash/table*'
  --data-root DIR    a folder with data; without it ADASPLASH_DATA, the Hugging Face hub, or the embedded data
  --gpus N           experiments side by side, one a GPU
  --force            run again what has up-to-date records
  --help             this text

The active virtual or conda environment is used if it has what is needed, else .venv is made (once);
ADASPLASH_VENV names another folder for it. The exit code is 0 if nothing failed.
TEXT
}
usage_error() { echo "error: $* (./run_all.sh --help lists the options)" >&2; exit 2; }

scale=smoke
options=(--all)
while [ $# -gt 0 ]; do
  case $1 in
    --scale | --only | --data-root | --gpus) [ $# -ge 2 ] || usage_error "$1 needs a value" ;;
  esac
  case $1 in
    --scale) scale=$2; shift ;;
    --only) options+=(--only "$2"); shift ;;
    --gpus)
      [[ $2 =~ ^[1-9][0-9]*$ ]] || usage_error "--gpus: $2 is not a number of GPUs"
      options+=(--gpus "$2"); shift ;;
    --data-root)
      [ -d "$2" ] || usage_error "--data-root: $2 is not a folder"
      options+=(--data-root "$(CDPATH='' cd -- "$2" && pwd)"); shift ;;
    --force) options+=(--force) ;;
    -h | --help) usage; exit 0 ;;
    *) usage_error "unknown option $1" ;;
  esac
  shift
done
case $scale in
  smoke | lab | paper) ;;
  *) usage_error "--scale: $scale is not one of smoke, lab, paper" ;;
esac

cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
. tasks/environment.sh
use_environment experiments
exec "$PYTHON" -m tasks run --scale "$scale" "${options[@]}"
