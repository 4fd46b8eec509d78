"""This tool measures what each rank holds, on its device and in host memory, with more and more data-parallel ranks.

    python -m tools.rank_memory [--ranks 1 2 4]

A small MoE with routing replay takes steps on the same batch in each layout, on this machine's CPUs. The figures are
bytes of live torch storages, which a dispatch mode counts in each process (`tools/step_memory.py`): on a GPU, those of
the device. `step` is the peak of the second optimiser step, `saving` what a checkpoint takes beside what was alive
before it, `background` the same of one that is written beside the training, and `routes` the host memory of recorded
routes. The last line is a JSON object: KiB by number of ranks, of the fullest rank.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from fiberpo_megatron.certify.processes import run_ranks
from tools.step_memory import LiveStorages, architecture, trajectories

KIB = 2**10
SIZES = argparse.Namespace(layers=4, hidden=128, vocabulary=4096, row_tokens=256, rows=8, experts=8, heads=4)


def main() -> None:
    """Measure all numbers of ranks and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    found = {}
    names = ("states", "step", "saving", "background", "routes")
    print(f"{'KiB':<8}" + "".join(f"{name:>12}" for name in names))
    for ranks in options.ranks:
        found[ranks] = fullest(measure_ranks(ranks))
        print(f"{ranks:<8}" + "".join(f"{found[ranks][name]:>12.0f}" for name in names), flush=True)
    print(json.dumps({"kib": found}))


def measure_ranks(ranks: int, sizes: argparse.Namespace = SIZES) -> list[dict[str, float]]:
    """Return the KiB of every rank of a run with so many data-parallel ranks and a model of these sizes."""
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(ranks, measure, folder, sizes, on_cpu=True)


def fullest(ranks: list[dict[str, float]]) -> dict[str, float]:
    """Return the largest figure of all ranks, by name."""
    return {name: max(rank[name] for rank in ranks) for name in ranks[0]}


def measure(folder: str, sizes: argparse.Namespace) -> dict[str, float]:
    """Return the KiB of this rank."""
    from fiberpo_megatron.config import Config
    from fiberpo_megatron.data.packing import pack
    from fiberpo_megatron.mcore.parallel.layout import start_layout
    from fiberpo_megatron.mcore.policy import build_policy
    from fiberpo_megatron.types import Coefficients

    config = Config.model_validate(
        {
            "model": {"path": "unused", "random_init": True, "dtype": "bfloat16", "log_prob_chunk_tokens": 64},
            "algorithm": {"routing_replay": "old"},
        }
    )
    hf_config = architecture(sizes)
    layout = start_layout(hf_config, config.parallel, config.run)
    batch, rows = trajectories(sizes)

    def gate(log_probs: Tensor, part: slice) -> Coefficients:
        return Coefficients(torch.full_like(log_probs, 1e-3))

    with LiveStorages() as storages:
        policy = build_policy(config, hf_config, layout)
        mine = rows[layout.data_rank :: layout.data_size]
        micro_batches = pack(batch, mine, sequence_multiple=layout.sequence_multiple)
        policy.log_probs(micro_batches, 1.0, routing="record")
        storages.apart = lambda: policy.routing.host_bytes
        for _ in range(2):
            storages.peak = 0
            policy.step(micro_batches, gate, 1.0)
        step, found = storages.peak, {}
        policy.routing.clear()
        states = storages.live()
        for name, background in (("saving", False), ("background", True)):
            storages.peak = 0
            target = str(Path(folder) / f"step-{int(background) + 1:08d}")
            if background:
                pending = policy.begin_save(target, {})
                held = max(storages.peak, storages.live())
                pending.finish()
            else:
                policy.save(target, {})
                held = storages.peak
            found[name] = (held - states) / KIB
        policy.log_probs(micro_batches, 1.0, routing="record")
        return {"states": states / KIB, "step": step / KIB, "routes": policy.routing.host_bytes / KIB, **found}


if __name__ == "__main__":
    main()
