"""Before any training: what a rank will hold, and what it will send. Nothing is allocated and nobody is asked.

`plans.py` has the function; `model.py` what is known of a model; `timeline.py` ShardedAdamax, moment by moment;
`peers.py` DistributedDataParallel and ZeroRedundancyOptimizer; `sources.py` how the command is told of a model;
`report.py` and `picture.py` what it shows.
"""

from sharded_adamax.planning.footprint import Footprint
from sharded_adamax.planning.plans import SCHEMES, Plan, Row, Scheme, plan

__all__ = ["SCHEMES", "Footprint", "Plan", "Row", "Scheme", "plan"]
