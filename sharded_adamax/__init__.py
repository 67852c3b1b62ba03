"""torch.optim.Adamax with its state, its gradients and its work sharded over the ranks of a data-parallel job."""

from sharded_adamax.bootstrap import DistributedContext, init_distributed
from sharded_adamax.checkpoint import CheckpointDamagedError, CheckpointError, CheckpointManager, load, save
from sharded_adamax.optimizer import ShardedAdamax
from sharded_adamax.planning import plan

__all__ = [
    "CheckpointDamagedError",
    "CheckpointError",
    "CheckpointManager",
    "DistributedContext",
    "ShardedAdamax",
    "init_distributed",
    "load",
    "plan",
    "save",
]
