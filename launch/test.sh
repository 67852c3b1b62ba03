#!/usr/bin/env bash
# Lint, types and tests. Arguments go to pytest: `bash launch/test.sh tests/unit -k layout`.
#
# Two files at a time: much of a test with real launchers is waiting for processes to start. `-n 0` is one after another.
# In the order of their names: that of the number of tests would leave one long test alone at the end.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy --strict sharded_adamax launch
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
