"""Certificates on machines with GPUs: which ranks get one, and on which device the sides of a comparison are."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fiberpo_megatron.certify import certificate, kernels, real_ranks
from fiberpo_megatron.certify.batch import Batch, made_batches
from fiberpo_megatron.certify.checks import Check
from fiberpo_megatron.certify.compare import Difference
from fiberpo_megatron.config import Config
from fiberpo_megatron.fibration import build_objective
from tests.certify.test_gates import tokens
from tools.strict_devices import strict_devices

MODEL = Path(__file__).parents[2] / "examples/demo/model"


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def test_two_processes_with_one_gpu_reduce_over_gloo(one_gpu: None):
    """NCCL refuses two ranks on one GPU; the certificate says where they ran."""
    (check,) = real_ranks.check_processes(("grpo", {}), [Batch("one", tokens())], 2, 0)
    assert check.what == "2 processes on the CPU, over gloo"
    assert check.passed and check.tolerance is None


def test_layouts_of_more_ranks_than_gpus_run_on_the_cpu(one_gpu: None, monkeypatch: pytest.MonkeyPatch):
    """One rank has the GPU; the coefficients are compared with one call on the device of the ranks."""
    ran: list[tuple[int, bool]] = []
    compared: list[str] = []

    def run_ranks(ranks: int, function: Any, *arguments: Any, on_cpu: bool = False) -> list[Any]:
        ran.append((ranks, on_cpu))
        return [reference if function is certificate.run_reference else [None] * 3] * ranks

    class reference:
        index = old_log_probs = torch.zeros(0)

    def own_gates(case: Any, outcomes: Any, part: str, what: str, subject: str, device: str) -> Check:
        compared.append(f"{what}: {device}")
        return Check(part, what, subject, {})

    monkeypatch.setattr(certificate, "run_ranks", run_ranks)
    monkeypatch.setattr(certificate, "replace", lambda one, **_: one)
    monkeypatch.setattr(certificate, "compare", lambda *_: ({"gradient": Difference(0, 0.0, 0.0, None)}, ""))
    monkeypatch.setattr(certificate, "check_own_gates", own_gates)
    monkeypatch.setattr(certificate, "LAYOUTS", {"one process": {}, "TP2": {"tensor": 2}})
    config = Config.model_validate({"model": {"path": str(MODEL), "random_init": True}})
    objective, found = build_objective("grpo"), certificate.Certificate({})
    said: list[str] = []
    step = certificate._training_steps(found, config, objective, ("grpo", {}), 2, 1, 2, said.append)
    whats = [check.what for check in step if check.part == certificate.STEP]
    assert ran == [(1, True), (1, False), (2, True)]
    assert whats[-1] == "TP2, micro-batches of 96 tokens, on the CPU (too few GPUs)"
    assert not any("CPU" in what for what in whats[:-1])
    assert compared == [f"{what}: {'cpu' if what.startswith('TP2') else 'cuda'}" for what in whats]


def test_the_process_of_the_kernels_mixes_no_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Orders and cuts are made on the host, tokens and results are on the GPU until they are written."""
    build = kernels.build_objective
    monkeypatch.setattr(kernels, "build_objective", lambda use, **options: build(use, **options | {"kernels": False}))
    batch = made_batches(build_objective("fiberpo"), 0, 2, 2)[0][0].tokens
    torch.save(("fiberpo", {}, [vars(batch)], 0, "cuda"), tmp_path / "call")
    with strict_devices():
        kernels.main(str(tmp_path / "call"))
    (found,) = torch.load(tmp_path / "found", weights_only=True)
    first = found.pop("in one call")
    assert {"the same call again", "tokens in reverse order", "3 data-parallel ranks, whole trajectories"} < set(found)
    for result in found.values():
        assert torch.equal(result["gradient"], first["gradient"])
