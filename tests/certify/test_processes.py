"""Processes of one machine that form a layout, and what comes back when one of them fails."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from fiberpo_megatron.certify.processes import RanksFailed, collect_ranks, run_ranks


def rank_and_sum(extra: int) -> tuple[int, int]:
    dist.init_process_group("gloo")
    total = torch.tensor([dist.get_rank() + extra])
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def fail_on_one() -> int:
    if os.environ["RANK"] == "1":
        raise ValueError("no such thing")
    dist.init_process_group("gloo")
    dist.barrier()
    return 0


def vanish() -> None:
    os._exit(3)


def sleep() -> None:
    time.sleep(60)


def test_values_come_back_in_rank_order():
    assert run_ranks(2, rank_and_sum, 10) == [(0, 21), (1, 21)]


def test_an_exception_names_its_rank(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fiberpo_megatron.certify.processes._GRACE_S", 0.5)
    with pytest.raises(RanksFailed, match="rank 1 of 2 failed: ValueError: no such thing"):
        run_ranks(2, fail_on_one)


def test_a_vanished_rank_is_told():
    (outcome,) = collect_ranks(1, vanish)
    assert outcome.error is not None and "died silently" in outcome.error


def test_the_deadline_holds():
    start = time.monotonic()
    (outcome,) = collect_ranks(1, sleep, timeout_s=1)
    assert outcome.error is not None and "still running" in outcome.error
    assert time.monotonic() - start < 15
