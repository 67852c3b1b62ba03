"""Which wrappers around an optimizer are taken off; those of the frameworks are in tests/integration/frameworks."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from sharded_adamax import ShardedAdamax
from sharded_adamax.wrappers import unwrapped


class Lookahead(Optimizer):
    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer


class OfAFramework(Lookahead):
    __module__ = "accelerate.optimizer"


def test_a_wrapper_that_is_no_frameworks_may_have_a_state_of_its_own_and_stays() -> None:
    inner = ShardedAdamax([torch.nn.Parameter(torch.ones(3))])
    own = Lookahead(inner)
    assert unwrapped(inner) is inner
    assert unwrapped(own) is own
    assert unwrapped(OfAFramework(own)) is own
    assert unwrapped(OfAFramework(OfAFramework(inner))) is inner
