"""This tool measures the peak memory of an optimiser step with and without each option that saves memory.

    python tools/step_memory.py [--layers 4 --hidden 128 --vocabulary 16384 --row-tokens 1024 --rows 2]
    python tools/step_memory.py --phases --cases "log-probs in chunks of 256" [--experts 0]

A small MoE trains for two steps, each case in a separate process; the second step is measured, when Adam's moments
exist. On a GPU the figures are torch.cuda.max_memory_allocated(). Without one they are the bytes of all live torch
storages, which a dispatch mode counts in the process; host copies of parked state are left out, because on a device
they would not be counted either. The last line is a JSON object: MiB by case, `step` (peak) and `generating` (what
stays while engines generate).

With `--phases` it measures each phase of the second step instead, and prints the planner's figure for it beside: what
stays between steps, and the peaks of the old log-probs, of the forward and backward passes, and of the optimizer. The
ratio is what was measured over what was planned. CUDA's context and what the allocator reserves beyond the tensors are
in neither.
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
RESIDENT, OLD, PASSES, UPDATE = "between steps", "old log-probs", "forward and backward", "optimizer"


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
    parser.add_argument("--experts", type=int, default=8, help="experts of each layer, 0 for a dense model (default 8)")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--phases", action="store_true", help="measure phases beside the planner's figures")
    parser.add_argument("--here", action="store_true", help="measure the one case in this process")
    options = parser.parse_args()
    if options.here:
        measured: Any = measure_phases if options.phases else measure
        print(json.dumps(measured(options.cases[0], options)))
        return
    found = {}
    names = ("layers", "hidden", "vocabulary", "row-tokens", "rows", "experts", "heads")
    sizes = [f"--{name}={getattr(options, name.replace('-', '_'))}" for name in names]
    columns = ("measured", "planned", "ratio") if options.phases else ("step, peak", "generating")
    print(f"{'MiB':<34}" + "".join(f" {column:>10}" for column in columns))
    for case in options.cases:
        command = [sys.executable, __file__, *sizes, "--here", "--cases", case]
        command += ["--phases"] if options.phases else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=900)
        found[case] = json.loads(done.stdout.splitlines()[-1])
        if not options.phases:
            print(f"{case:<34} {found[case]['step']:>10.1f} {found[case]['generating']:>10.1f}", flush=True)
            continue
        print(case)
        for phase, row in found[case].items():
            print(f"  {phase:<32} {row['measured']:>10.1f} {row['planned']:>10.1f} {row['ratio']:>10.3f}", flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps({"device": device, "mib": found}))


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


def measure_phases(case: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return what a phase took in MiB, what was planned for it, and their ratio, by phase."""
    from fiberpo_megatron.mcore.platform import activate

    activate()
    if torch.cuda.is_available():
        found = _peaks(case, options, torch.cuda.memory_allocated, _cuda_peak)
    else:
        with LiveStorages() as storages:

            def peak() -> int:
                highest, storages.peak = storages.peak, 0
                return highest

            found = _peaks(case, options, storages.live, peak)
    planned = plan_phases(case, options)
    return {
        phase: {"measured": taken / MIB, "planned": planned[phase] / MIB, "ratio": taken / planned[phase]}
        for phase, taken in found.items()
    }


def _cuda_peak() -> int:
    """Return the largest number of bytes that were allocated since the last call."""
    highest = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return highest


def _peaks(case: str, options: argparse.Namespace, live: Callable[[], int], peak: Callable[[], int]) -> dict[str, int]:
    """Return the bytes of each phase of the second of two steps; `peak` gives the largest number since its last
    call."""
    from fiberpo_megatron.types import Coefficients

    policy, micro_batches = build(case, options)

    def gate(log_probs: Tensor, part: slice) -> Coefficients:
        return Coefficients(torch.full_like(log_probs, 1e-3))

    found: dict[str, int] = {}
    for _ in range(2):
        found[RESIDENT] = live()
        peak()
        old = policy.log_probs(micro_batches, 1.0).log_probs
        found[OLD] = peak()
        policy.accumulate(micro_batches, gate, 1.0, log_probs=old)
        found[PASSES] = peak()
        policy.optimizer.begin_step()
        with policy.memory.state("an optimiser step"):
            policy.optimizer.step()
        found[UPDATE] = peak()
        del old
    return found


def plan_phases(case: str, options: argparse.Namespace) -> dict[str, int]:
    """Return the planner's bytes of each phase, without what it reserves for the allocator and CUDA."""
    from fiberpo_megatron.mcore.families import read_architecture
    from fiberpo_megatron.planning.estimate import Workload, plan_stage
    from fiberpo_megatron.planning.hardware import assume

    config = configure(case, options)
    length = options.row_tokens // 4
    prompt = (length + 1) // 4 - 1  # the first response token is predicted by the last of the prompt
    work = Workload(4 * options.rows, prompt, length - prompt, 1, options.rows)
    assumptions = assume(["expert_imbalance=1.0"])  # a single rank has all experts
    implementation = "te" if torch.cuda.is_available() else "local"
    stage = plan_stage(config, read_architecture(architecture(options)), 1, 0, work, assumptions, implementation)
    states, away = stage.states.total, stage.states.optimizer if stage.offloaded else 0
    return {
        RESIDENT: states - away,
        OLD: states - away + stage.forward + stage.log_probs,
        PASSES: states - away + stage.activations + stage.log_probs,
        UPDATE: states,
    }


def configure(case: str, options: argparse.Namespace) -> Any:
    """Return the config of a case."""
    from fiberpo_megatron.config import Config

    sections: dict[str, dict[str, Any]] = {name: {**BASE[name], **CASES[case].get(name, {})} for name in BASE}
    sections["model"] |= {"path": "unused", "random_init": True}
    sections["batch"] = {"micro_batch_tokens": options.row_tokens}
    return Config.model_validate(sections)


def build(case: str, options: argparse.Namespace) -> tuple[Any, Any]:
    """Return a policy and the packed rows of random trajectories."""
    from fiberpo_megatron.data.packing import pack
    from fiberpo_megatron.mcore.parallel.layout import start_layout
    from fiberpo_megatron.mcore.policy import build_policy

    config = configure(case, options)
    hf_config = architecture(options)
    policy = build_policy(config, hf_config, start_layout(hf_config, config.parallel, config.run))
    batch, rows = trajectories(options)
    return policy, pack(batch, rows, sequence_multiple=policy.layout.sequence_multiple)


def prepare(case: str, options: argparse.Namespace) -> tuple[Any, Callable[[], Any]]:
    """Return a policy, and one optimiser step of it on random trajectories."""
    from fiberpo_megatron.types import Coefficients

    policy, micro_batches = build(case, options)

    def gate(log_probs: Tensor, part: slice) -> Coefficients:
        return Coefficients(torch.full_like(log_probs, 1e-3))

    return policy, lambda: policy.step(micro_batches, gate, 1.0, single_pass=True)


def architecture(options: argparse.Namespace) -> dict[str, Any]:
    """Return a Qwen3-MoE with so many experts, 2 of them for each token; with 0 a dense Qwen3."""
    if not options.experts:
        return {**_common(options), "model_type": "qwen3", "tie_word_embeddings": False}
    return {
        **_common(options),
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 2 * options.hidden,
        "num_experts": options.experts,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    }


def _common(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "vocab_size": options.vocabulary,
        "hidden_size": options.hidden,
        "intermediate_size": 4 * options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.heads // 2,
        "head_dim": options.hidden // options.heads,
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
