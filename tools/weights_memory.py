"""This tool measures each rank's peak memory while it loads and saves Hugging Face weights, beside its shard's size.

    torchrun --nproc-per-node 2 tools/weights_memory.py --tensor 2 --expert_tensor 2
    torchrun --nproc-per-node 2 tools/weights_memory.py --expert 2

A random Qwen3-MoE in float32 of about 480 MB is made in a temporary folder. Memory is what Linux counts as anonymous
(RssAnon), above what the process had before the model was built: pages of the mapped weight files, which the kernel can
drop at any time, do not count.
"""

import argparse
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fiberpo_megatron.config.schema import Config
from fiberpo_megatron.mcore.families import read_architecture
from fiberpo_megatron.mcore.model import build_model
from fiberpo_megatron.mcore.parallel.layout import start_layout, stop_layout
from fiberpo_megatron.mcore.weights import export_hf, load_hf, save_hf

MIB = 2**20
LARGE = {"hidden_size": 512, "moe_intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 16384}


@dataclass(frozen=True)
class Memory:
    """Holds the memory of one rank in bytes."""

    shard: int
    """Its parameters."""
    loading: int
    """Peak while loading, the parameters included."""
    saving: int
    """Peak while saving, the parameters included."""


def describe_model(sizes: dict[str, int]) -> dict[str, Any]:
    """Return config.json of a Qwen3-MoE with 16 experts."""
    return {
        "model_type": "qwen3_moe",
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "intermediate_size": 1024,
        "rope_theta": 10000.0,
        **sizes,
    }


def random_tensors(config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of the model, one at a time."""
    hidden, inner, rows = config["hidden_size"], config["moe_intermediate_size"], config["vocab_size"]
    queries, keys = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    for name in ("model.embed_tokens", "lm_head"):
        yield f"{name}.weight", torch.randn(rows, hidden)
    yield "model.norm.weight", torch.ones(hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{name}.weight", torch.ones(hidden)
        for name in ("q_norm", "k_norm"):
            yield f"{prefix}self_attn.{name}.weight", torch.ones(config["head_dim"])
        for name, width in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield f"{prefix}self_attn.{name}.weight", torch.randn(width, hidden)
        yield f"{prefix}self_attn.o_proj.weight", torch.randn(hidden, queries)
        yield f"{prefix}mlp.gate.weight", torch.randn(config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            for name in ("gate_proj", "up_proj"):
                yield f"{prefix}mlp.experts.{expert}.{name}.weight", torch.randn(inner, hidden)
            yield f"{prefix}mlp.experts.{expert}.down_proj.weight", torch.randn(hidden, inner)


def write_model(folder: Path, sizes: dict[str, int]) -> None:
    """Write config and safetensors files of about 100 MiB."""
    source = folder.with_name(f"{folder.name}-config")
    source.mkdir()
    config = describe_model(sizes)
    (source / "config.json").write_text(json.dumps(config))
    save_hf(random_tensors(config), folder, source, shard_bytes=100 * MIB)


def measure(folder: Path, parallel: dict[str, int], bucket_bytes: int) -> Memory:
    """Return this rank's memory while the launched ranks load and save the model."""
    hf_config = json.loads((folder / "config.json").read_text())
    model = {"path": folder, "dtype": "float32"}
    config = Config.model_validate({"model": model, "parallel": parallel})
    layout = start_layout(hf_config, config.parallel, config.run)
    dist.barrier()
    base = anonymous_bytes()
    with peak() as loading:
        chunks = build_model(read_architecture(hf_config), config.model, layout)
        load_hf(chunks, hf_config, folder, layout)
    with peak() as saving:
        tensors = export_hf(chunks, hf_config, layout, bucket_bytes=bucket_bytes)
        save_hf(tensors, folder.with_name(f"{folder.name}-saved"), folder, writer=layout.rank == 0)
    shard = sum(parameter.nbytes for chunk in chunks for parameter in chunk.parameters())
    return Memory(shard, loading[0] - base, saving[0] - base)


def anonymous_bytes() -> int:
    """Return the memory of this process that belongs to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith("RssAnon:"))
    return int(kibibytes) * 1024


@contextmanager
def peak() -> Iterator[list[int]]:
    """Sample the anonymous memory in this block every 2 ms; yield a list with the highest value."""
    highest, stop = [anonymous_bytes()], threading.Event()

    def sample() -> None:
        while not stop.wait(0.002):
            highest[0] = max(highest[0], anonymous_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield highest
    finally:
        stop.set()
        thread.join()


def main() -> None:
    """Measure the ranks that torchrun started and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("tensor", "pipeline", "expert", "expert_tensor"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--bucket-mib", type=int, default=64, help="weights sent to rank 0 in one message")
    options = parser.parse_args()
    bucket = options.bucket_mib * MIB
    sizes = {key: value for key, value in vars(options).items() if key != "bucket_mib"}
    root = Path(tempfile.gettempdir()) / f"weights_memory_{os.environ['TORCHELASTIC_RUN_ID']}_{os.getppid()}"
    ready = root / "ready"
    if os.environ["RANK"] == "0":
        root.mkdir()
        write_model(root / "model", LARGE)
        ready.touch()
    while not ready.exists():
        threading.Event().wait(0.2)
    memory = measure(root / "model", sizes, bucket)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, memory)
    if dist.get_rank() == 0:
        total = sum(file.stat().st_size for file in (root / "model").glob("*.safetensors"))
        print(f"model {total / MIB:.0f} MiB, {sizes}")
        for rank, found in enumerate(everyone):
            print(
                f"rank {rank}: shard {found.shard / MIB:4.0f} MiB, peak while loading {found.loading / MIB:4.0f} MiB, "
                f"while saving {found.saving / MIB:4.0f} MiB"
            )
    stop_layout()


if __name__ == "__main__":
    main()
