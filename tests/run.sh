#!/usr/bin/env bash
# Installs what the tests need and runs them: in the active virtual environment, else in .venv. Arguments go to pytest.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -n "${VIRTUAL_ENV:-}" ]; then
  python="$VIRTUAL_ENV/bin/python"
else
  [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
  python=.venv/bin/python
fi
"$python" -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
if [ $# -eq 0 ]; then
  "$python" -m ruff check .
  "$python" -m ruff format --check .
  "$python" -m mypy
fi
exec "$python" -m pytest -n auto "$@"
