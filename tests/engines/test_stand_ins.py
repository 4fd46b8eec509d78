"""The CPU stand-ins: the hash that seeds sampling, that the trainer cannot see them, and that each is needed."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fiberpo_megatron.engines.command as command
from fiberpo_megatron.engines.errors import EngineStartError
from fiberpo_megatron.engines.servers import engines
from fiberpo_megatron.engines.settings import EngineConfig

MASK = 0xFFFFFFFF


def murmur3_reference(blocks: list[int]) -> int:
    """MurmurHash3_x86_32 with seed 0 over 4-byte blocks, from its definition in Python integers."""
    h = 0
    for k in blocks:
        k = k * 0xCC9E2D51 & MASK
        k = (k << 15 | k >> 17) & MASK
        h ^= k * 0x1B873593 & MASK
        h = (h << 13 | h >> 19) & MASK
        h = h * 5 + 0xE6546B64 & MASK
    h ^= 4 * len(blocks)
    h = (h ^ h >> 16) * 0x85EBCA6B & MASK
    h = (h ^ h >> 13) * 0xC2B2AE35 & MASK
    return h ^ h >> 16


def test_the_reference_is_murmur_hash_3():
    # published vectors: four zero bytes, and "test" (0x74736574 as little-endian block), both with seed 0
    assert murmur3_reference([0]) == 0x2362F9DE
    assert murmur3_reference([0x74736574]) == 0xBA6BD213


def test_the_hash_of_seed_position_and_token():
    spec = importlib.util.spec_from_file_location("stand_in", command.CPU_STAND_INS / "sgl_kernel" / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    seeds, positions, columns = [0, 7, 2**62 + 12345, 2**63 - 1], [0, 5, 100000, 2**31 - 1], [0, 1, 63, 151935]
    hashed = torch.ops.sgl_kernel.murmur_hash32_cpu(
        torch.tensor(seeds).to(torch.uint64), torch.tensor(positions), torch.tensor(columns)
    )
    assert hashed.dtype == torch.uint32
    expected = [
        [murmur3_reference([seed & MASK, seed >> 32, position, column]) for column in columns]
        for seed, position in zip(seeds, positions)
    ]
    assert hashed.tolist() == expected
    with pytest.raises(NotImplementedError, match=r"sgl_kernel.rmsnorm_cpu is not in the CPU stand-in"):
        module.rmsnorm_cpu()


def test_the_trainer_does_not_see_them():
    code = (
        "import fiberpo_megatron.engines.servers, sys; print([m for m in ('triton', 'sgl_kernel') if m in sys.modules])"
    )
    code += "; print([p for p in sys.path if 'sglang_cpu' in p])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split("\n")[:2] == ["[]", "[]"]


@pytest.mark.slow
@pytest.mark.sglang
@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        pytest.param("triton", "No module named 'triton'", marks=pytest.mark.exhaustive),
        ("sgl_kernel", "No module named 'sgl_kernel'"),
        pytest.param("torchvision", "No module named 'torchvision'", marks=pytest.mark.exhaustive),
        pytest.param("ALLOC_MEMORY_FUNCS[", "", marks=pytest.mark.exhaustive),
        pytest.param("server_args.add_deterministic", "torch_native", marks=pytest.mark.exhaustive),
        pytest.param("enable_batch_invariant_mode", "No supported accelerator", marks=pytest.mark.exhaustive),
    ],
)
def test_without_one_of_them_the_server_does_not_start(left_out, message, checkpoint, tmp_path, monkeypatch):
    """Slow: six server starts; each shows that a line of the README's tables is still true."""
    folder = tmp_path / "path"
    shutil.copytree(command.CPU_STAND_INS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    if (folder / left_out).is_dir():
        shutil.rmtree(folder / left_out)
    else:
        plugin = folder / "fiberpo_sglang_cpu.py"
        lines = plugin.read_text().splitlines()
        kept = [line for line in lines if not (left_out in line and line.startswith("    "))]
        assert len(kept) == len(lines) - 1
        plugin.write_text("\n".join(kept))
    monkeypatch.setattr(command, "CPU_STAND_INS", folder)
    options = {"dtype": "float32", "gpu": False, "routed_experts": True}
    with (
        pytest.raises(EngineStartError, match=rf"ended with [\s\S]*{message}"),
        engines(EngineConfig(start_timeout_s=120), checkpoint, Path(tmp_path), **options),
    ):
        pass
