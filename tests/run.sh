#!/usr/bin/env bash
# Creates the test environment (.venv, or $LLMKIT_VENV) and runs all checks: style, types, tests.
#   bash tests/run.sh             all checks
#   bash tests/run.sh tests/io    only some tests (any pytest arguments)
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${LLMKIT_VENV:-.venv}
if [ ! -x "$VENV/bin/python" ]; then
    python3 -m venv "$VENV"
fi
# Install if pyproject.toml or the pinned versions are newer than the last installation.
installed=$VENV/.llmkit-installed
if [ pyproject.toml -nt "$installed" ] || [ tests/constraints.txt -nt "$installed" ]; then
    "$VENV/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check -e '.[test,web,ray]' -c tests/constraints.txt
    touch "$installed"
fi
export PATH="$PWD/$VENV/bin:$PATH"
[[ $VENV = /* ]] && export PATH="$VENV/bin:$PATH"
unset PYTHONDONTWRITEBYTECODE  # or each of hundreds of processes would compile the sources again
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
if [ $# -eq 0 ]; then
    ruff check .
    ruff format --check .
    mypy >"$VENV/mypy.log" 2>&1 &  # beside the tests
    types=$!
    set -- tests
fi
# Three processes, as many tests wait for others; each file runs in one of them, in order, so that long ones do not come
# last. (-n 0: a single process.)
code=0
python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder "$@" || code=$?
if [ -n "${types:-}" ] && ! wait "$types"; then
    cat "$VENV/mypy.log"
    code=1
fi
exit "$code"
