#!/usr/bin/env bash
# Makes the test environment (.venv, or $LLMKIT_VENV) and runs every check: style, types, tests.
#   bash tests/run.sh             everything
#   bash tests/run.sh tests/io    the tests of one part (any pytest arguments)
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${LLMKIT_VENV:-.venv}
if [ ! -x "$VENV/bin/python" ]; then
    python3 -m venv "$VENV"
fi
# Install when pyproject.toml is newer than the last installation.
if [ ! -e "$VENV/.llmkit-installed" ] || [ pyproject.toml -nt "$VENV/.llmkit-installed" ]; then
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[test,web,ray]'
    touch "$VENV/.llmkit-installed"
fi
export PATH="$PWD/$VENV/bin:$PATH"
[[ $VENV = /* ]] && export PATH="$VENV/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
if [ $# -eq 0 ]; then
    ruff check .
    ruff format --check .
    mypy
    set -- tests
fi
# Two processes, each file in one of them, in order: the long ones are not the last. (-n 0: all in one process.)
exec python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
