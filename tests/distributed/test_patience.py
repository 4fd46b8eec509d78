"""Ranks wait for work that takes longer than a collective may."""

import time

import pytest

from fiberpo_megatron.certify.processes import run_ranks
from fiberpo_megatron.mcore.parallel.layout import start_layout
from fiberpo_megatron.together import together
from tests.distributed.parity import QWEN3_MOE, make_config

COLLECTIVE_S, WORK_S = 4.0, 6.0
"""The first also bounds the start of the ranks, so that it cannot be much shorter on a busy machine."""


def long_work(patience_s: float | None) -> list[str]:
    """Let rank 1 work for longer than a collective waits, twice; return what each time ended with."""
    config = make_config(parallel={"data": 2}, run={"distributed_timeout_s": COLLECTIVE_S})
    layout = start_layout(QWEN3_MOE, config.parallel, config.run)
    ends = []
    for work_s in (0.0, WORK_S):
        try:
            with together(layout, "generating rollouts", patience_s):
                time.sleep(work_s if layout.rank == 1 else 0.0)
            ends.append("all finished")
        except (RuntimeError, TimeoutError) as error:
            ends.append(f"{type(error).__name__}: {error}")
    return ends


def test_generation_may_take_longer_than_a_collective():
    waited, worked = run_ranks(2, long_work, 60.0)
    assert waited == worked == ["all finished", "all finished"]


@pytest.mark.exhaustive
def test_a_collective_would_not_have_waited():
    waited, _ = run_ranks(2, long_work, None)
    assert waited[0] == "all finished" and "imed out" in waited[1]


def test_the_wait_ends_and_names_the_rank_that_is_missing():
    waited, _ = run_ranks(2, long_work, 1.0)
    assert waited[1].startswith("TimeoutError: generating rollouts: rank 1 did not finish within 1 s")
