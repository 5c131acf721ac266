#!/bin/sh
# Installs the project into the environment of a Python. Used by the Makefile and by the Dockerfile.
#
#   deploy/install.sh dependencies PYTHON LOCK    everything pinned in LOCK
#   deploy/install.sh project PYTHON [-e]         deltaserve itself, with -e from this folder as it stands
#
# PIP_ARGS holds further arguments of pip for the dependencies, such as an extra index with CPU-only wheels of torch.
set -eu
cd "$(dirname "$0")/.."
what=$1
python=$2
case $what in
dependencies)
    lock=$3
    # The locks are complete, so pip need not resolve anything.
    # shellcheck disable=SC2086 # PIP_ARGS is a list
    "$python" -m pip install ${PIP_ARGS:-} --no-deps --requirement "$lock"
    # But torch's CUDA build pins packages of its own that no lock could name for CPU and GPU alike: they come last,
    # and its Triton takes the place of the one that tests use beside CPU builds. requirements.lock constrains what is
    # resolved (not $lock: pip would install, with dependencies, a file that a constraints file includes).
    # shellcheck disable=SC2086
    "$python" -m pip install ${PIP_ARGS:-} --constraint requirements.lock torch setuptools
    ;;
project)
    "$python" -m pip install --no-deps --no-build-isolation ${3:+"$3"} .
    ;;
*)
    echo "deploy/install.sh: unknown step '$what'" >&2
    exit 2
    ;;
esac
