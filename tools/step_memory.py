"""This tool measures the peak memory of an optimiser step with and without each option that saves memory.

    python tools/step_memory.py [--layers 4 --hidden 128 --vocabulary 16384 --row-tokens 1024 --rows 2]

A small MoE trains for two steps, each case in a separate process; the second step is measured, when Adam's moments
exist. On a GPU the figures are torch.cuda.max_memory_allocated(). Without one they are the bytes of all live torch
storages, which a dispatch mode counts in the process; host copies of parked state are left out, because on a device
they would not be counted either. The last line is a JSON object: MiB by case, `step` (peak) and `generating` (what
stays while engines generate).
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BASE = {"model": {"dtype": "bfloat16", "recompute": "none", "log_prob_chunk_tokens": 1 << 30}, "optimizer": {}}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    # settings that differ from BASE
    "nothing saved": {},
    "log-probs in chunks of 256": {"model": {"log_prob_chunk_tokens": 256}},
    "selective recompute": {"model": {"recompute": "selective"}},
    "full recompute": {"model": {"recompute": "full"}},
    "optimizer offload": {"optimizer": {"cpu_offload": True}},
    "chunks, full recompute, offload": {
        "model": {"recompute": "full", "log_prob_chunk_tokens": 256},
        "optimizer": {"cpu_offload": True},
    },
    "the same, in float32": {
        "model": {"recompute": "full", "log_prob_chunk_tokens": 256, "dtype": "float32"},
        "optimizer": {"cpu_offload": True},
    },
}
MIB = 2**20


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of the storages that are alive after every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.apart: Callable[[], int] = lambda: 0
        """Returns the bytes that must not be counted."""
        self.peak = 0
        self._storages: dict[int, StorageWeakRef] = {}

    def live(self) -> int:
        """Return the bytes that are alive now."""
        total = 0
        for key, reference in list(self._storages.items()):
            if reference.expired():
                del self._storages[key]
            else:
                storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
                total += storage.nbytes() if storage is not None else 0
        return total - self.apart()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        fresh = False
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                known = self._storages.get(storage._cdata)
                if known is None or known.expired():
                    self._storages[storage._cdata] = StorageWeakRef(storage)
                    fresh = True
        if fresh:
            self.peak = max(self.peak, self.live())
        return out


def main() -> None:
    """Measure all cases, or the one that a parent process asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, usual in (("layers", 4), ("hidden", 128), ("vocabulary", 16384), ("row-tokens", 1024), ("rows", 2)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--here", action="store_true", help="measure the one case in this process")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.cases[0], options)))
        return
    found = {}
    sizes = [
        f"--{name}={getattr(options, name.replace('-', '_'))}"
        for name in ("layers", "hidden", "vocabulary", "row-tokens", "rows")
    ]
    print(f"{'MiB':<34} {'step, peak':>10} {'generating':>10}")
    for case in options.cases:
        command = [sys.executable, __file__, *sizes, "--here", "--cases", case]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=900)
        found[case] = json.loads(done.stdout.splitlines()[-1])
        print(f"{case:<34} {found[case]['step']:>10.1f} {found[case]['generating']:>10.1f}", flush=True)
    print(json.dumps({"device": "cuda" if torch.cuda.is_available() else "cpu", "mib": found}))


def measure(case: str, options: argparse.Namespace) -> dict[str, float]:
    """Return the MiB of one case."""
    from fiberpo_megatron.mcore.platform import activate

    activate()
    if torch.cuda.is_available():
        policy, step = prepare(case, options)
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated()
        policy.release_memory()
        return {"step": peak / MIB, "generating": torch.cuda.memory_allocated() / MIB}
    with LiveStorages() as storages:
        policy, step = prepare(case, options)
        storages.apart = policy.memory.host_bytes
        step()
        storages.peak = 0
        step()
        peak = storages.peak
        policy.release_memory()
        return {"step": peak / MIB, "generating": storages.live() / MIB}


def prepare(case: str, options: argparse.Namespace) -> tuple[Any, Callable[[], Any]]:
    """Return a policy, and one optimiser step of it on random trajectories."""
    from fiberpo_megatron.config import Config
    from fiberpo_megatron.data.packing import pack
    from fiberpo_megatron.mcore.parallel.layout import start_layout
    from fiberpo_megatron.mcore.policy import build_policy
    from fiberpo_megatron.types import Coefficients

    sections = {name: {**BASE[name], **CASES[case].get(name, {})} for name in BASE}
    sections["model"] |= {"path": "unused", "random_init": True}
    config = Config.model_validate(sections)
    hf_config = architecture(options)
    policy = build_policy(config, hf_config, start_layout(hf_config, config.parallel, config.run))
    batch, rows = trajectories(options)
    micro_batches = pack(batch, rows, sequence_multiple=policy.layout.sequence_multiple)

    def gate(log_probs: Tensor, part: slice) -> Coefficients:
        return Coefficients(torch.full_like(log_probs, 1e-3))

    return policy, lambda: policy.step(micro_batches, gate, 1.0, single_pass=True)


def architecture(options: argparse.Namespace) -> dict[str, Any]:
    """Return a Qwen3-MoE with 8 experts, 2 of them for each token."""
    return {
        "model_type": "qwen3_moe",
        "vocab_size": options.vocabulary,
        "hidden_size": options.hidden,
        "intermediate_size": 4 * options.hidden,
        "moe_intermediate_size": 2 * options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": options.hidden // 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "initializer_range": 0.02,
    }


def trajectories(options: argparse.Namespace) -> tuple[Any, list[list[int]]]:
    """Return rows of four trajectories of which a quarter is the prompt."""
    from fiberpo_megatron.types import RolloutBatch

    count, length = 4 * options.rows, options.row_tokens // 4 + 1
    mask = np.tile(np.arange(length) >= length // 4, count)
    rng = np.random.default_rng(0)
    batch = RolloutBatch.filled(
        tokens=rng.integers(0, options.vocabulary, count * length),
        response_mask=mask,
        rollout_log_probs=np.zeros(len(mask), np.float32),
        lengths=np.full(count, length, np.int64),
        rewards=np.zeros(count, np.float32),
        correct=np.zeros(count, np.bool_),
        groups=np.arange(count, dtype=np.int64),
        domains=np.zeros(count, np.int64),
        truncated=np.zeros(count, np.bool_),
    )
    return batch, [list(range(4 * row, 4 * row + 4)) for row in range(options.rows)]


if __name__ == "__main__":
    main()
