"""``python -m sharded_adamax``."""

import sys

from sharded_adamax.cli import main

sys.exit(main())
