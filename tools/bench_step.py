"""This tool times an optimiser step of the policy beside what Megatron-Core alone takes for the same rows.

    python tools/bench_step.py --ranks 2
    python tools/bench_step.py --ranks 1 --dtype bfloat16 --layers 8 --hidden 2048 --heads 16 --vocabulary 151936 \
        --rows 4 --row-tokens 8192 --fused-loss te

Both use the same model in the same process groups, the same packed rows and the same optimizer. The bare step is
Megatron's: a forward and a backward pass over all rows with its own output layer and cross-entropy on every token, the
reduction of the gradients, and the optimizer. With `--fused-loss` it is timed with a fused loss of Megatron's as well.
Beside it run `MegatronPolicy.step` with a real objective in a single
pass, the same in two passes, and the first step on a fresh batch after the pass that finds its old log-probs. Every
token but the first of a sequence is a response token, so that all of them pass the output layer in either case.

All are timed in turn, in an order that changes from round to round. A machine that is also used by others only
ever adds time, so that the figures are those of the fastest round of each; beside the time on the clock stands the
time of the processors, of all ranks together. A further round says where the difference goes. The last line is a JSON
object with the ratios to the bare step, the tokens of all ranks in a second of each step, and the peak of the memory
that rank 0 has allocated on a GPU. A single rank runs in this process, where Megatron may compile its fused functions;
several run with `TORCH_COMPILE_DISABLE=1` unless it is set.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from fiberpo_megatron.certify.processes import run_ranks

BARE, FUSED, SINGLE, TWO = "bare Megatron", "fused loss", "single pass", "two passes"
FRESH = "with old log-probs"
TEMPERATURE = 1.0


class Bench:
    """Holds one rank's policy, its rows, and the three steps that are timed."""

    def __init__(self, options: argparse.Namespace) -> None:
        from fiberpo_megatron.config import Config
        from fiberpo_megatron.fibration import build_objective
        from fiberpo_megatron.mcore.parallel.layout import start_layout
        from fiberpo_megatron.mcore.policy import build_policy
        from fiberpo_megatron.trainer.batch import mini_batches

        layout_options = {"tensor": options.tensor, "distributed_optimizer": not options.whole_optimizer}
        config = Config.model_validate(
            {
                "model": {"path": "unused", "random_init": True, "dtype": options.dtype},
                "parallel": layout_options,
                "batch": {"micro_batch_tokens": options.row_tokens, "kept_forwards": options.kept_forwards},
            }
        )
        hf_config = architecture(options)
        self.layout = start_layout(hf_config, config.parallel, config.run)
        self.policy = build_policy(config, hf_config, self.layout, total_steps=1_000_000)
        rollouts = trajectories(options, self.layout.data_size)
        advantages = np.random.default_rng(1).normal(size=len(rollouts.lengths)).astype(np.float32)
        (self.part,) = mini_batches(
            rollouts, advantages, batch=config.batch, weighting="seq-mean", domains=1, layout=self.layout, version=0
        )
        self.objective = build_objective(options.objective)
        scores = self.policy.log_probs(self.part.micro_batches, TEMPERATURE)
        self.old = torch.zeros(0) if scores is None else scores.log_probs + 0.05 * torch.randn_like(scores.log_probs)
        self.steps: dict[str, Callable[[], object]] = {
            BARE: self.bare_step,
            **({FUSED: partial(self.bare_step, options.fused_loss)} if options.fused_loss else {}),
            SINGLE: partial(self.step, True),
            TWO: partial(self.step, False),
            FRESH: self.fresh_step,
        }

    def step(self, single: bool) -> None:
        """Take an optimiser step as the trainer does."""
        from fiberpo_megatron.trainer.optimise import ObjectiveGate

        gate = ObjectiveGate(self.objective, self.part, self.old, None if single else self.layout.sum_over_tokens)
        self.policy.step(self.part.micro_batches, gate, TEMPERATURE, single_pass=single)

    def fresh_step(self) -> None:
        """Find the log-probs and take the first optimiser step on them, as the trainer does with a fresh batch."""
        from fiberpo_megatron.trainer.optimise import ObjectiveGate

        scores = self.policy.log_probs(self.part.micro_batches, TEMPERATURE, keep=True)
        old = torch.zeros(0) if scores is None else scores.log_probs
        gate = ObjectiveGate(self.objective, self.part, old, self.layout.sum_over_tokens)
        self.policy.step(self.part.micro_batches, gate, TEMPERATURE, log_probs=old)

    def bare_step(self, fused_loss: str | None = None) -> None:
        """Take an optimiser step with Megatron-Core alone, with its usual loss or with a fused one of its own."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        policy = self.policy
        for model in policy.models:
            model.config.cross_entropy_loss_fusion = fused_loss is not None
            model.config.cross_entropy_fusion_impl = fused_loss or "native"
        for chunk in policy.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        policy.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=self._bare_forward,
            data_iterator=iter(self.part.micro_batches),
            model=policy.chunks,
            num_microbatches=len(self.part.micro_batches),
            seq_length=1,
            micro_batch_size=1,
            forward_only=False,
        )
        policy.scheduler.step(1)
        policy.optimizer.step()

    def _bare_forward(self, rows: Iterator[Any], chunk: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        from fiberpo_megatron.mcore.platform import activate

        batch, device = next(rows), self.layout.device
        packed = activate().packed_sequences(batch.cu_seqlens, batch.max_seqlen, 0, 1)
        packed.micro_batch = 0
        hidden = chunk(
            batch.tokens.to(device)[None],
            batch.position_ids.to(device)[None],
            attention_mask=None,
            packed_seq_params=packed,
        )
        model = self.policy.models[-1]
        logits, _ = model.output_layer(hidden)
        # Transformer Engine's fused cross-entropy takes int64 alone
        losses = model.compute_language_model_loss(batch.labels.to(device, torch.int64)[None], logits)
        return losses, _summed


def _summed(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return losses.sum() * 1e-4, torch.tensor(0, dtype=torch.int, device=losses.device), {}


def architecture(options: argparse.Namespace) -> dict[str, Any]:
    """Return the config.json of a dense Qwen3, or with `--experts` of a Qwen3-MoE."""
    experts = {
        "model_type": "qwen3_moe",
        "num_experts": options.experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 2 * options.hidden,
        "norm_topk_prob": True,
    }
    return {
        "model_type": "qwen3",
        "vocab_size": options.vocabulary,
        "hidden_size": options.hidden,
        "intermediate_size": 4 * options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.heads,
        "head_dim": options.hidden // options.heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        **(experts if options.experts else {}),
    }


def trajectories(options: argparse.Namespace, replicas: int) -> Any:
    """Return trajectories of equal lengths whose prompts have one token: four of them fill a row."""
    from fiberpo_megatron.types import RolloutBatch

    count, length = 4 * options.rows * replicas, options.row_tokens // 4 + 1
    return RolloutBatch.filled(
        tokens=np.random.default_rng(0).integers(0, options.vocabulary, count * length),
        response_mask=np.tile(np.arange(length) > 0, count),
        lengths=np.full(count, length, np.int64),
        groups=np.arange(count, dtype=np.int64) // 4,
    )


def run_rank(options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of every round of each step on this rank, by the clock and of the processors."""
    bench = Bench(options)
    names = list(bench.steps)
    on_gpu = bench.layout.device.type == "cuda"
    peak: dict[str, int] = dict.fromkeys(names, 0)
    clock: dict[str, list[float]] = {name: [] for name in names}
    processor: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(options.rounds + options.warm_up):
        first = round_ % len(names)
        for name in [*names[first:], *names[:first]]:
            _synchronise(bench.layout)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            began, used = time.perf_counter(), time.process_time()
            bench.steps[name]()
            used = time.process_time() - used
            _synchronise(bench.layout)  # a step is over when it is on every rank
            if round_ >= options.warm_up:
                clock[name].append(time.perf_counter() - began)
                processor[name].append(used)
            if on_gpu:
                peak[name] = torch.cuda.max_memory_allocated()
    parts = {name: _parts(bench, name) for name in names}
    return {
        "clock": clock,
        "processor": processor,
        "parts": parts,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "tokens": 4 * (options.row_tokens // 4) * options.rows * bench.layout.data_size,
        "peak_gib": {name: round(size / 2**30, 2) for name, size in peak.items()} if on_gpu else None,
    }


def _synchronise(layout: Any) -> None:
    if layout.device.type == "cuda":
        torch.cuda.synchronize()
    layout.barrier()


def _parts(bench: Bench, name: str, times: int = 3) -> dict[str, float]:
    """Return the seconds that each part of a step takes, measured with the device's work finished after each."""
    from fiberpo_megatron.mcore import log_probs
    from fiberpo_megatron.mcore.parallel.layout import ParallelLayout
    from fiberpo_megatron.trainer.optimise import ObjectiveGate

    seconds: dict[str, float] = defaultdict(float)
    model, optimizer = bench.policy.models[-1], bench.policy.optimizer
    with (
        _timed(seconds, "forward without gradient", bench.policy.schedule, "forward"),
        _timed(seconds, "rows", bench.policy.schedule, "_prepared"),
        _timed(seconds, "log-probs, forward", bench.policy.schedule, "log_probs_of"),
        _timed(seconds, "log-probs, backward", log_probs._LinearLogProbs, "backward"),
        _timed(seconds, "output layer and loss, forward", model, "compute_language_model_loss"),
        _timed(seconds, "output layer and loss, forward", model.output_layer, "forward"),
        _timed(seconds, "gate", ObjectiveGate, "_evaluate"),
        _timed(seconds, "agreement of the ranks", ParallelLayout, "agree"),
        _timed(seconds, "zeroing of the gradients", bench.policy.chunks[0], "zero_grad_buffer"),
        _timed(seconds, "reduction of the gradients", model.config, "finalize_model_grads_func"),
        _timed(seconds, "norm of the gradients", optimizer, "begin_step"),
        _timed(seconds, "optimizer, without the norm in ours", optimizer, "step"),
    ):
        for _ in range(times):
            _synchronise(bench.layout)
            began = time.perf_counter()
            bench.steps[name]()
            _synchronise(bench.layout)
            seconds["whole step"] += time.perf_counter() - began
    return {part: value / times for part, value in seconds.items()}


@contextmanager
def _timed(seconds: dict[str, float], part: str, owner: Any, method: str) -> Iterator[None]:
    """Add the time of a method, or of a module's function, to `seconds[part]` inside the block."""
    own = method in vars(owner)
    whole = getattr(owner, method)

    @wraps(whole)
    def timed(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return whole(*arguments, **named)
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[part] += time.perf_counter() - began

    setattr(owner, method, timed)
    try:
        yield
    finally:
        if own:
            setattr(owner, method, whole)
        else:
            delattr(owner, method)


def report(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Print the times and where they go, and return the ratios to the bare step, with tokens per second and memory."""
    clock = {name: min(seconds) for name, seconds in found[0]["clock"].items()}
    processor = {
        name: min(sum(seconds) for seconds in zip(*(rank["processor"][name] for rank in found))) for name in clock
    }
    print(f"{'fastest of the rounds':<34}{'ms on the clock':>16}{'ratio':>8}{'ms of processors':>18}{'ratio':>8}")
    for name in clock:
        times = f"{clock[name] * 1e3:>16.1f}{clock[name] / clock[BARE]:>8.3f}"
        print(f"{name:<34}{times}{processor[name] * 1e3:>18.1f}{processor[name] / processor[BARE]:>8.3f}")
    parts = found[0]["parts"]
    print(f"\n{'where it goes on rank 0, ms':<34}" + "".join(f"{name:>20}" for name in parts))
    for part in dict.fromkeys(part for seconds in parts.values() for part in seconds):
        values = [seconds.get(part) for seconds in parts.values()]
        print(f"{part:<34}" + "".join(f"{'-' if v is None else f'{v * 1e3:.1f}':>20}" for v in values))
    fused = (
        {}
        if FUSED not in clock
        else {
            "single_pass_ratio_to_fused": clock[SINGLE] / clock[FUSED],
            "two_pass_ratio_to_fused": clock[TWO] / clock[FUSED],
        }
    )
    return {
        "single_pass_ratio": clock[SINGLE] / clock[BARE],
        "two_pass_ratio": clock[TWO] / clock[BARE],
        "with_old_log_probs_ratio": clock[FRESH] / clock[BARE],
        "single_pass_processor_ratio": processor[SINGLE] / processor[BARE],
        "two_pass_processor_ratio": processor[TWO] / processor[BARE],
        **fused,
        "tokens_per_second": {name: round(found[0]["tokens"] / seconds, 2) for name, seconds in clock.items()},
        "peak_gib": found[0]["peak_gib"],
    }


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {
        "ranks": (2, "processes"),
        "tensor": (1, "tensor-parallel ranks among them; the rest is data-parallel"),
        "layers": (4, "layers of the model"),
        "hidden": (256, "hidden size"),
        "heads": (4, "attention heads"),
        "vocabulary": (8192, "tokens of the vocabulary"),
        "experts": (0, "experts of each layer, 0 for a dense model"),
        "rows": (4, "packed rows of each data-parallel rank"),
        "row-tokens": (1024, "tokens of a row"),
        "rounds": (8, "timed rounds"),
        "kept-forwards": (1, "rows that pass the model once in two passes (batch.kept_forwards)"),
        "warm-up": (1, "rounds before them"),
    }
    for name, (usual, meaning) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=usual, help=f"{meaning} (default {usual})")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--objective", default="fiberpo", help="short name or import path of the objective")
    parser.add_argument(
        "--fused-loss", choices=("native", "te"), help="time the bare step with this fused loss of Megatron's as well"
    )
    parser.add_argument("--whole-optimizer", action="store_true", help="do not shard the optimizer's state")
    return parser.parse_args(words)


def main() -> None:
    """Print the times and the ratios."""
    options = arguments()
    found = [run_rank(options)] if options.ranks == 1 else run_ranks(options.ranks, run_rank, options)
    ratios = report(found)
    print(json.dumps({"device": found[0]["device"], "ranks": options.ranks, **ratios}))


if __name__ == "__main__":
    main()
