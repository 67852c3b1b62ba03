#!/usr/bin/env bash
# Train on 2 ranks, kill, resume on 3, kill, finish on 1; pictures and a summary go to demo_out/.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" demo
exec "$python" launch/demo.py "$@"
