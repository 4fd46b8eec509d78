"""No rank holds more than its shard, the message being sent and a tensor while weights come in or go out."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fiberpo_megatron.certify.processes import run_ranks
from tools.weights_memory import MIB, measure, write_model

SIZES = {"hidden_size": 256, "moe_intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 8192}
"""114 MiB; the largest tensors have 8 MiB."""
BUCKET = 8 * MIB
SLACK = 32 * MIB
"""Buffers that the allocator keeps after their use, gloo's, Python objects. The whole model on top of a shard would be
114 MiB."""


@pytest.mark.parametrize("parallel", [{"tensor": 2, "expert_tensor": 2}, {"expert": 2}], ids=["TP2", "EP2"])
def test_near_the_shard(parallel: dict[str, int], tmp_path: Path):
    write_model(tmp_path / "model", SIZES)
    for rank, memory in enumerate(run_ranks(2, measure, tmp_path / "model", parallel, BUCKET)):
        assert 50 * MIB < memory.shard < 80 * MIB
        assert memory.loading < memory.shard + 8 * MIB + SLACK
        # rank 0: the others' shards of a bucket and a full tensor; others: their part of a bucket
        assert memory.saving < memory.shard + BUCKET + 8 * MIB + SLACK, rank
    files = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "model-saved").iterdir())
    for name in (file for file in files if file.endswith(".safetensors")):
        loaded, saved = (load_file(tmp_path / folder / name) for folder in ("model", "model-saved"))
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[tensor], saved[tensor]) for tensor in loaded)
