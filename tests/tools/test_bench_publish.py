"""The benchmark of publications: what its stand-ins hold is compared bit for bit, and a difference is an error."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


sys.path.append(str(ROOT / "tools"))  # the processes of the floor import bench_publish by its name
engine: Any = importlib.import_module("bench_publish_engine")
bench: Any = importlib.import_module("bench_publish")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the model one of a MiB, in several rounds of a MiB each at most."""
    for name, value in {"HIDDEN": 64, "INNER": 96, "HEADS": 2, "VOCABULARY": 1024}.items():
        monkeypatch.setattr(bench, name, value)


WORDS = ["--mib", "3", "--round-mib", "1", "--attempts", "1"]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("engines", "ways"),
    [
        (1, ["ipc", "disk"]),
        pytest.param(2, ["ipc", "distributed", "disk", "delta"], marks=pytest.mark.exhaustive),
    ],
)
def test_stand_ins_hold_what_was_published_bit_for_bit(
    engines: int, ways: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    words = ["--engines", str(engines), "--ways", *ways, "--folder", str(tmp_path)]
    assert bench.main([*WORDS, *words]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["bitwise"] == dict.fromkeys(ways, True)
    whole = set(ways) - {"delta"}  # what `delta` writes is compared with the bytes of all weights, and has no floor
    assert result["rounds"]["ipc"] > 1 and result["ratio"].keys() == whole
    if "delta" in ways:
        assert 0 < result["delta_share"] < 0.5


@pytest.mark.usefixtures("small")
def test_an_engine_with_other_bytes_is_an_error(monkeypatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """One bit of one weight differs between what the trainer has and what it published."""
    real = bench.checksum

    def of_others(tensors: dict[str, torch.Tensor]) -> str:
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        changed["model.norm.weight"].view(torch.uint8)[5] ^= 1
        return real(changed)

    monkeypatch.setattr(bench, "checksum", of_others)
    words = [*WORDS, "--engines", "1", "--ways", "ipc", "--folder", str(tmp_path)]
    assert bench.main(words) == 1
    captured = capfd.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["bitwise"] == {"ipc": False}
    assert "ipc: an engine holds other bytes" in captured.err


def test_the_checksum_is_of_names_and_bytes():
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(3, dtype=torch.bfloat16)}
    expected = engine.checksum(tensors)
    assert engine.checksum({name: tensors[name].clone() for name in ("b", "a")}) == expected
    assert engine.checksum({"a": tensors["a"], "c": tensors["b"]}) != expected
    assert engine.checksum({**tensors, "a": tensors["a"].nextafter(torch.tensor(9.0))}) != expected
    negative_zero = tensors["b"].clone()
    negative_zero[0] = -0.0
    assert torch.equal(negative_zero, tensors["b"]) and engine.checksum({**tensors, "b": negative_zero}) != expected


def test_memory_that_does_not_come_back_is_an_error():
    result = {"bitwise": {}, "growth": {"ipc": [2**28, 0], "disk": [0, 2**20]}}
    assert len(bench.faults_of(result)) == 1 and "ipc: torch's allocator has 268435456" in bench.faults_of(result)[0]


def test_nccl_between_two_processes_on_one_gpu_is_refused():
    assert bench.chosen_ways(None, gpu=True) == ["ipc", "disk", "delta"]
    assert bench.chosen_ways(None, gpu=False) == ["ipc", "distributed", "disk", "delta"]
    assert bench.chosen_ways(["distributed"], gpu=False) == ["distributed"]
    with pytest.raises(ValueError, match="--ways distributed: .* one GPU"):
        bench.chosen_ways(["ipc", "distributed"], gpu=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_buffers_on_a_gpu_come_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    words = ["--mib", "256", "--engines", "2", "--attempts", "8", "--ways", "ipc", "--folder", str(tmp_path)]
    assert bench.main(words) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["bitwise"] == {"ipc": True} and result["growth"]["ipc"][0] == 0
