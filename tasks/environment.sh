# Sourced by run_all.sh and run_tests.sh in the repository root: finds or makes the Python environment.
#
#   use_environment EXTRAS      EXTRAS as in pyproject.toml, e.g. experiments,dev
#
# sets PYTHON to an interpreter that has what pyproject.toml asks for: that of the active virtual or conda
# environment where it suffices, else that of .venv (ADASPLASH_VENV names another folder), which is made or
# brought up to date. .venv/adasplash-stamp says what was installed there; as long as pip works it says
# "unfinished" and by which process, so that an installation that was killed is started over.

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }

# ask PYTHON COMMAND...: tasks/environment.py; -P keeps tasks/, which may shadow modules, off the import path
ask() { local python=$1; shift; "$python" -P tasks/environment.py "$@" 2>/dev/null; }

use_environment() {
  local extras=$1 venv=${ADASPLASH_VENV:-.venv} active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}} problem
  trap 'say "Interrupted."; exit 130' INT
  PYTHON=$venv/bin/python
  if [ -n "$active" ] && ! [ "$active" -ef "$venv" ]; then
    if problem=$(ask "$active/bin/python" check --extras "$extras"); then
      say "Using the active environment $(basename "$active")"
      PYTHON=$active/bin/python
    else
      say "Not using the active environment $(basename "$active"): ${problem:-it has no Python that runs}"
    fi
  fi
  [ "$PYTHON" != "$venv/bin/python" ] || prepare_venv "$venv" "$extras"
  # the checkout that the script lies in is the one to run, also where the environment holds another one
  export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}"
  trap - INT
}

prepare_venv() {
  local venv=$1 extras=$2 python=$1/bin/python stamp=$1/adasplash-stamp log=$1/install.log
  local base problem installer
  if is_stamped "$python" "$stamp" "$extras"; then return; fi
  if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && [ ! -e "$stamp" ]; then # somebody else's: use it or leave it
    if problem=$(ask "$python" check --extras "$extras"); then return; fi
    fail "$venv was not made by this script and does not suffice (${problem:-it has no Python that runs});" \
      "remove it, or set ADASPLASH_VENV to another folder"
  fi
  installer=$(sed -n 's/^unfinished //p' "$stamp" 2>/dev/null || true)
  if [ -n "$installer" ] && kill -0 "$installer" 2>/dev/null; then
    fail "process $installer is installing into $venv: wait for it, or stop it"
  fi

  if [ -n "$installer" ] || ! ask "$python" interpreter >/dev/null; then
    base=$(find_python) || exit 1
    say "Making a Python environment in $venv with $base:" \
      "PyTorch and the rest are large, this takes minutes (log: $log)"
    rm -rf -- "$venv"
    mkdir -p -- "$venv"
    echo "unfinished $$" >"$stamp"
    "$base" -m venv "$venv" >"$log" 2>&1 || install_failed "$log" "the environment could not be made"
  else
    say "Updating the Python environment in $venv: this can take minutes (log: $log)"
    echo "unfinished $$" >"$stamp"
  fi
  "$python" -m pip install --no-input -c constraints.txt -e ".[$extras]" >"$log" 2>&1 ||
    install_failed "$log" "the packages could not be installed"
  ask "$python" stamp --extras "$extras" >"$stamp.new"
  mv -- "$stamp.new" "$stamp"
}

# is_stamped PYTHON STAMP EXTRAS: was all of EXTRAS installed for the present pyproject.toml, constraints.txt?
is_stamped() {
  local wanted line
  [ -e "$2" ] && wanted=$(ask "$1" stamp --extras "$3") || return 1
  while IFS= read -r line; do
    grep -qxF -- "$line" "$2" || return 1
  done <<<"$wanted"
}

# find_python: prints an interpreter that can make the environment
find_python() {
  local name base lacking='' requires
  # each is run, not only looked up: version managers have launchers of versions that they cannot start
  for name in python3.12 python3.11 python3.13 python3 python; do
    base=$(ask "$name" interpreter) || continue
    if "$base" -c 'import ensurepip, venv' 2>/dev/null; then
      printf '%s\n' "$base"
      return
    fi
    lacking=$base
  done
  [ -z "$lacking" ] || fail "$lacking cannot make environments, it lacks the modules venv and ensurepip" \
    "(Debian, Ubuntu: install python3-venv)"
  requires=$(sed -n 's/^requires-python = "\(.*\)"/\1/p' pyproject.toml)
  fail "no Python $requires was found (looked for python3.12, python3.11, python3.13, python3 and python)"
}

# install_failed LOG WHAT: the end of the log, and what to look at first
install_failed() {
  local hint='see the log'
  local offline='connection broken|Could not fetch URL|ConnectionError|ReadTimeout|ProxyError'
  if grep -q 'No space left' "$1"; then
    hint='the disk is full: make room, or set ADASPLASH_VENV and TMPDIR to folders on another disk'
  elif grep -qE "$offline" "$1"; then
    hint='the package index was not reached: is there a network, is a proxy needed?'
  fi
  tail -n 12 "$1" >&2
  fail "$2; $hint ($1). The next call starts over."
}
