"""Processes of one machine that form a layout, and what comes back when one of them fails."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from fiberpo_megatron.certify.processes import RanksFailed, collect_ranks, run_ranks, too_few_gpus


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


def abort() -> None:
    os.abort()


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
    assert outcome.error == "the process ended with exit code 3 without a report"


def test_a_crash_in_native_code_names_its_signal_and_the_line_of_python():
    with pytest.raises(
        RanksFailed, match="(?s)rank 0 of 1 failed: the process ended with signal SIGABRT.*line .* in abort"
    ):
        run_ranks(1, abort)


def test_the_deadline_holds():
    start = time.monotonic()
    (outcome,) = collect_ranks(1, sleep, timeout_s=1)
    assert outcome.error is not None and "still running" in outcome.error
    assert time.monotonic() - start < 15


def parents_and_gpus() -> tuple[int, str | None]:
    return os.getppid(), os.environ.get("CUDA_VISIBLE_DEVICES")


def test_ranks_on_a_gpu_are_not_forked(monkeypatch: pytest.MonkeyPatch):
    """The server of the forks activates the platform; what is forked from a process that uses CUDA cannot use it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert run_ranks(2, parents_and_gpus) == [(os.getpid(), "0,1")] * 2
    ((parent, visible),) = run_ranks(1, parents_and_gpus, on_cpu=True)
    assert parent != os.getpid() and visible == ""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def tf32() -> str | None:
    return os.environ.get("NVIDIA_TF32_OVERRIDE")


def test_ranks_on_a_gpu_multiply_float32_in_float32(monkeypatch: pytest.MonkeyPatch):
    """A rank of an H200 was 0.9 from float64 with TF32, and 1e-6 without it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    assert run_ranks(1, tf32) == ["0"]
    assert tf32() is None
    assert run_ranks(1, tf32, on_cpu=True) == [None]
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert run_ranks(1, tf32) == ["1"]
    assert tf32() == "1"


def test_ranks_without_a_gpu_each_are_known(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [too_few_gpus(ranks) for ranks in (1, 2, 3)] == [False, False, True]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not too_few_gpus(3)
