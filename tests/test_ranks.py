"""Ranks report what they return and how they fail, and none outlives its time."""

from __future__ import annotations

import time
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist

pytestmark = pytest.mark.xdist_group("ranks")


def behave(rank: int, ways: list[str]) -> Any:
    """One way for each rank."""
    if ways[rank] == "raises":
        raise ValueError(f"what rank {rank} says")
    if ways[rank] == "sleeps":
        time.sleep(600)
    if ways[rank] == "waits":
        dist.barrier()
    dist.all_reduce(total := torch.tensor(rank + 1.0))
    return total, rank


def test_results() -> None:
    """One from each rank, in order, of a group that all belong to."""
    assert ranks.run(2, behave, ["returns", "returns"]) == [(3.0, 0), (3.0, 1)]


def test_a_rank_that_fails() -> None:
    """Its traceback arrives, and the other one, which waits for it, does not hold up the test."""
    start = time.monotonic()
    with pytest.raises(AssertionError, match="what rank 1 says") as caught:
        ranks.run(2, behave, ["waits", "raises"])
    assert "in behave" in str(caught.value)
    assert time.monotonic() - start < 30


def test_a_rank_that_hangs() -> None:
    """It is killed when time is over, and the error says where it was."""
    start = time.monotonic()
    with pytest.raises(AssertionError, match="rank 1 of 2: no result in time") as caught:
        ranks.run(2, behave, ["waits", "sleeps"], timeout=7)
    assert "in behave" in str(caught.value)
    assert time.monotonic() - start < 15
