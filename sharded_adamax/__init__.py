"""torch.optim.Adamax with its state, its gradients and its work sharded over the ranks of a data-parallel job."""

from sharded_adamax.bootstrap import DistributedContext, init_distributed
from sharded_adamax.checkpoint import CheckpointDamagedError, CheckpointError, CheckpointManager, load, save
from sharded_adamax.optimizer import ShardedAdamax

__all__ = [
    "CheckpointDamagedError",
    "CheckpointError",
    "CheckpointManager",
    "DistributedContext",
    "ShardedAdamax",
    "init_distributed",
    "load",
    "save",
]
