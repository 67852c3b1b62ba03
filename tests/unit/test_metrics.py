"""Metrics where there is little to tell, and the clock behind them."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from sharded_adamax import ShardedAdamax
from sharded_adamax.collectives import Traffic


def test_before_the_first_step_there_is_nothing_to_tell() -> None:
    optimizer = ShardedAdamax([nn.Parameter(torch.ones(5))])
    assert set(optimizer.metrics().values()) == {0.0}
    assert "grad_norm" not in optimizer.metrics()


def test_a_norm_of_no_gradients_is_zero() -> None:
    optimizer = ShardedAdamax([nn.Parameter(torch.ones(5))])
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    assert optimizer.metrics()["grad_norm"] == 0.0


def test_an_optimizer_whose_parameters_are_all_frozen_has_metrics() -> None:
    optimizer = ShardedAdamax([nn.Parameter(torch.ones(5), requires_grad=False)])
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    assert optimizer.metrics()["grad_norm"] == 0.0
    assert optimizer.metrics_of_all_ranks()["exp_inf_max"] == 0.0


def test_waiting_is_added_up_by_kind_until_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.5, 20.0, 22.0, 30.0, 30.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    traffic = Traffic()
    with traffic.waiting("vote", "vote"):
        pass
    with pytest.raises(RuntimeError, match="nobody came"), traffic.waiting("vote", "vote"):
        raise RuntimeError("nobody came")
    with traffic.waiting("all_gather", "gather bucket 0"):
        pass
    assert traffic.take_waited_seconds() == {"vote": 2.5, "all_gather": 0.25}
    assert traffic.take_waited_seconds() == {}
