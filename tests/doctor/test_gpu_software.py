"""What the doctor says of the driver, Transformer Engine, apex and the variables of NCCL."""

import importlib.util
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from fiberpo_megatron.config import Config
from fiberpo_megatron.doctor import gpu_software
from fiberpo_megatron.doctor.ranks import _of_machines
from fiberpo_megatron.doctor.report import Finding
from fiberpo_megatron.engines.command import TorchLibraries


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    assert (finding.status == "pass") == (not finding.fix), "whatever is not a pass names its fix"
    return finding


@pytest.mark.parametrize(
    ("version", "cuda", "status"),
    [
        ("570.86", "13.0", "fail"),
        ("580.65.06", "13.0", "pass"),
        ("570.86", "12.8", "pass"),
        ("570.86", None, "pass"),
        ("unknown", "13.0", "pass"),
    ],
)
def test_the_driver_fits_torchs_cuda(version: str, cuda: str | None, status: str):
    finding = only(gpu_software.driver(version, cuda))
    assert finding.status == status and version in finding.seen


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """Pretend that these modules, and no others, can be found."""

    def pretend(*names: str) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace() if name in names else None)
        monkeypatch.setattr(metadata, "version", lambda name: "2.20.2")

    return pretend


def test_what_transformer_engine_and_apex_bring(installed):
    installed()
    assert only(gpu_software.transformer_engine()).status == "fail"
    assert "is not installed: Transformer Engine's Adam" in only(gpu_software.apex()).seen
    installed("transformer_engine", "apex", "amp_C", "fused_weight_gradient_mlp_cuda")
    assert only(gpu_software.transformer_engine()).seen.startswith("2.20.2: attention of packed rows")
    assert only(gpu_software.apex()).seen == "fused accumulation of weight gradients, fused Adam"
    installed("apex", "amp_C")
    broken = only(gpu_software.apex())
    assert broken.status == "warn" and broken.seen.endswith("no fused accumulation of weight gradients")


def test_more_than_one_connection_is_a_warning():
    assert only(gpu_software.variables({})).seen.startswith("CUDA_DEVICE_MAX_CONNECTIONS=1, NCCL_CUMEM_ENABLE=0")
    finding = only(gpu_software.variables({"CUDA_DEVICE_MAX_CONNECTIONS": "8"}))
    assert finding.status == "warn" and "does not overlap" in finding.seen


def test_ranks_with_different_variables_are_named():
    usual, other = gpu_software.shared_variables({}), gpu_software.shared_variables({"NCCL_NVLS_ENABLE": "1"})
    extra = gpu_software.shared_variables({"NCCL_ALGO": "Ring", "NCCL_SOCKET_IFNAME": "eth0"})
    assert "NCCL_SOCKET_IFNAME" not in extra, "machines have different interfaces"

    def said(host: str, variables: dict[str, str]) -> dict[str, object]:
        return {"host": host, "gpus": None, "findings": [], "variables": variables}

    assert _of_machines({0: said("a", usual), 1: said("b", usual)}) == []
    first = only(_of_machines({0: said("a", usual), 1: said("a", usual), 2: said("b", other)}))
    assert first.status == "fail" and first.seen == "NCCL_NVLS_ENABLE is 1 on rank 2, and 0 on the others"
    second = only(_of_machines({0: said("a", extra), 1: said("b", usual), 2: said("c", usual)}))
    assert second.seen == "NCCL_ALGO is Ring on rank 0, and unset on the others"


@pytest.mark.parametrize(
    ("theirs", "method", "status"),
    [
        (TorchLibraries("2.14.1", "2.30.7"), "distributed", "pass"),
        (TorchLibraries("2.14.1", "2.28.3"), "distributed", "fail"),
        (TorchLibraries("2.14.1", "2.28.3"), "disk", "pass"),
        (TorchLibraries("2.10.0", "2.30.7"), "distributed", "warn"),
        (TorchLibraries("2.10.0", "2.30.7"), "disk", "pass"),
    ],
)
def test_an_engine_with_a_torch_of_its_own(tmp_path: Path, monkeypatch, theirs, method, status):
    python = tmp_path / "python"
    python.touch(mode=0o755)
    found = {sys.executable: TorchLibraries("2.14.1", "2.30.7"), str(python): theirs}
    monkeypatch.setattr(gpu_software, "torch_libraries", found.__getitem__)
    config = {"model": {"path": "m"}, "weight_sync": {"method": method}}
    assert gpu_software.engine_libraries(Config.model_validate(config)) == []
    given = config | {"rollout": {"engine": {"urls": ["http://a:1"], "python": str(python)}}}
    unknown = gpu_software.engine_libraries(Config.model_validate(given))
    assert [one.status for one in unknown] == (["warn"] if method == "distributed" else [])
    own = config | {"rollout": {"engine": {"python": str(python)}}}
    finding = only(gpu_software.engine_libraries(Config.model_validate(own)))
    assert finding.status == status and theirs.nccl in finding.seen
