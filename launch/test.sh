#!/usr/bin/env bash
# Lint, types and tests. Arguments go to pytest: `bash launch/test.sh tests/unit -k layout`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy --strict sharded_adamax launch
exec "$python" -m pytest "$@"
