#!/usr/bin/env bash
# Installs regtool into .venv and registers a real pair. Needs Python 3.11 or newer and a package index, nothing else.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

if [ ! -x .venv/bin/python ]; then
  python="${PYTHON:-python3}"
  if ! command -v "$python" >/dev/null; then
    echo "Python is not installed. regtool needs Python 3.11 or newer: https://www.python.org/downloads" >&2
    exit 1
  fi
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "regtool needs Python 3.11 or newer; $python is $("$python" --version 2>&1)." >&2
    echo "If you have a newer one, name it: PYTHON=python3.12 bash examples/quickstart.sh" >&2
    exit 1
  fi
  echo "Making .venv"
  if ! "$python" -m venv .venv; then
    rm -rf .venv
    echo "Could not make a virtual environment. On Debian and Ubuntu: sudo apt install python3-venv" >&2
    exit 1
  fi
fi
if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "The .venv here is of $(.venv/bin/python --version), regtool needs 3.11 or newer. Remove it and start again: rm -r .venv" >&2
  exit 1
fi

echo "Installing regtool (the first time this takes a few minutes)"
.venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt .

data=examples/data/hippocampus
output=examples/output/hippocampus
.venv/bin/regtool register "$data/hippocampus_150.nii.gz" "$data/hippocampus_152.nii.gz" \
  --fixed-labels "$data/hippocampus_150_labels.nii.gz" --moving-labels "$data/hippocampus_152_labels.nii.gz" \
  -o "$output" --overwrite

echo
echo "Results:      $root/$output"
echo "Quality page: $root/$output/qc.html"
