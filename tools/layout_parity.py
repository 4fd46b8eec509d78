"""This tool compares one layout with a single float64 process: log-probs, coefficients and the parameter gradient.

    python tools/layout_parity.py --tensor 2 --pipeline 2 --objective fiberpo-domain --micro-batch-tokens 64
    python tools/layout_parity.py --pipeline 2 --virtual-pipeline 2 --model latent --steps 3

A small model (`--model`: Qwen3-MoE, dense Qwen3 with tied embeddings, DeepSeek-V3) with the same seeded weights is run
(a) by one process in float64 with all trajectories in one micro-batch and (b) by tensor x pipeline x context x data
processes in float32 with the given token budget. The last line is a JSON object with `coefficient_max_relative_diff`,
`gradient_max_relative_diff` and `log_prob_max_relative_diff`: the largest difference over the largest reference value,
for gradients per global tensor. `--steps N` adds `parameter_max_relative_diff` after N optimiser steps, which the
reference takes with torch.optim.AdamW. The reference runs on CPU, the layout on GPUs if there are any.
"""

import argparse
import json
import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import TCPStore

DEADLINE_S = 300.0
TEMPERATURE = 0.8
MODEL: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": 0.1,
}
_NO_EXPERTS = {k: v for k, v in MODEL.items() if "expert" not in k and "moe_" not in k and k != "norm_topk_prob"}
MODELS: dict[str, dict[str, Any]] = {
    "moe": MODEL,
    "dense": {**_NO_EXPERTS, "model_type": "qwen3", "tie_word_embeddings": True},
    "latent": {
        **{k: v for k, v in _NO_EXPERTS.items() if k != "head_dim"},
        "model_type": "deepseek_v3",
        "num_key_value_heads": 8,
        "q_lora_rank": 32,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
    },
}
GROUPS, SAMPLES, DOMAINS = 6, 4, 3
SHARED_PREFIX = 6
LEARNING_RATE, ADAM_EPS, CLIP_GRAD = 1e-2, 1e-3, 0.3
"""Settings of `--steps`. Adam divides by the gradient's size: an eps far below it would turn rounding noise of elements
whose gradient is nearly zero into whole steps, in either run."""

Piece = tuple[str, tuple[int, ...], tuple[int, ...], NDArray[np.float64]]


@dataclass
class Outcome:
    """Holds what one rank computed."""

    coefficients: dict[int, float]
    """Coefficients by flat token index; empty except on the last pipeline stage."""
    log_probs: dict[int, float]
    gradient: list[Piece]
    """(key, global shape, offset, values) of this rank's parts of the global gradient."""
    parameters: list[Piece]
    """The same as `gradient` for the parameters after the steps; empty without steps."""


@dataclass(frozen=True)
class Problem:
    """Holds trajectories, advantages and old log-probs, all from the seed (old log-probs: from the reference)."""

    lengths: NDArray[np.int64]
    tokens: NDArray[np.int64]
    response_mask: NDArray[np.bool_]
    advantages: NDArray[np.float64]
    """[B]"""
    expert_share: NDArray[np.float64]
    """[N, partitions]"""
    drift: NDArray[np.float64]
    """[N] log ratio to the old policy."""


def make_problem(seed: int, partitions: int) -> Problem:
    """Draw trajectories of 3 to 64 tokens; their ratios are spread enough for clips and gates to act."""
    rng = np.random.default_rng(seed)
    count = GROUPS * SAMPLES
    lengths = np.concatenate([[64, 3], rng.integers(3, 40, count - 2)])
    mask = np.concatenate([np.arange(n) >= max(1, n // 3) for n in lengths])
    total = len(mask)
    shift = np.repeat(rng.normal(scale=0.15, size=count), lengths)
    return Problem(
        lengths=lengths,
        tokens=rng.integers(0, MODEL["vocab_size"], total),
        response_mask=mask,
        advantages=rng.normal(size=count),
        expert_share=rng.dirichlet(np.ones(partitions), size=total),
        drift=shift + rng.normal(scale=0.2, size=total),
    )


class Gate:
    """Applies the objective to this rank's response tokens."""

    def __init__(self, args: argparse.Namespace, problem: Problem, old: dict[int, float], index: Tensor) -> None:
        from fiberpo_megatron.fibration import build_objective

        self.objective = build_objective(args.objective)
        trajectory = np.repeat(np.arange(len(problem.lengths)), problem.lengths)[index]
        responses = np.add.reduceat(problem.response_mask, np.concatenate([[0], np.cumsum(problem.lengths)[:-1]]))
        group = trajectory // SAMPLES
        self.old = torch.tensor([old[i] for i in index.tolist()], dtype=torch.float64)
        self.advantages = torch.from_numpy(problem.advantages[trajectory])
        self.weights = torch.from_numpy(1.0 / (len(problem.lengths) * responses[trajectory]))
        self.share = torch.from_numpy(problem.expert_share[index])
        # As if the samples of a group began alike: their first tokens have states in common, on any rank.
        place = (np.cumsum(problem.response_mask) - 1)[index] - (np.cumsum(responses) - responses)[trajectory]
        state = np.where(place < SHARED_PREFIX, group * SHARED_PREFIX + place, -1)
        ids = {"trajectory": trajectory, "prompt_group": group, "domain": group % DOMAINS, "state": state}
        self.keys = {name: torch.from_numpy(values) for name, values in ids.items()}
        self.counts = {
            "trajectory": len(problem.lengths),
            "prompt_group": GROUPS,
            "domain": DOMAINS,
            "state": GROUPS * SHARED_PREFIX,
        }

    def __call__(self, log_probs: Tensor, where: slice, reduce: Any) -> Tensor:
        device = log_probs.device
        out = self.objective(
            log_probs.double() - self.old[where].to(device),
            self.advantages[where].to(device),
            self.weights[where].to(device),
            keys={name: ids[where].to(device) for name, ids in self.keys.items()},
            expert_share=self.share[where].to(device) if self.objective.uses_experts else None,
            reduce=reduce,
            counts=self.counts,
            metrics=False,
        )
        return out.gradient


def rollout_batch(problem: Problem) -> Any:
    """Return the problem as a RolloutBatch."""
    from fiberpo_megatron.types import RolloutBatch

    count = len(problem.lengths)
    return RolloutBatch.filled(
        tokens=problem.tokens,
        response_mask=problem.response_mask,
        rollout_log_probs=np.zeros(len(problem.tokens), dtype=np.float32),
        lengths=problem.lengths,
        rewards=np.zeros(count, dtype=np.float32),
        correct=np.zeros(count, dtype=bool),
        groups=np.arange(count) // SAMPLES,
        domains=np.arange(count) // SAMPLES % DOMAINS,
        truncated=np.zeros(count, dtype=bool),
    )


def make_config(args: argparse.Namespace) -> Any:
    """Return a run's config for this layout; routers train, so that their gradient is compared too."""
    from fiberpo_megatron.config.schema import Config

    names = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor", "data")
    sizes = {name: getattr(args, name) for name in names}
    return Config.model_validate(
        {
            "run": {"seed": args.seed, "distributed_timeout_s": DEADLINE_S / 3},
            "model": {"path": ".", "random_init": True, "dtype": "float32", "train_router": True},
            "parallel": {**sizes, "distributed_optimizer": False},
            "optimizer": {"learning_rate": LEARNING_RATE, "eps": ADAM_EPS, "clip_grad": CLIP_GRAD},
        }
    )


def local_micro_batches(problem: Problem, layout: Any, budget: int | None) -> list[Any]:
    """Return this rank's rows; a budget of None puts everything into one."""
    from fiberpo_megatron.data.packing import assign_rows, pack, padded_lengths

    sizes = padded_lengths(problem.lengths, layout.sequence_multiple)
    rows = assign_rows(sizes, layout.data_size, budget or int(sizes.sum()), "own_micro_batch")
    return pack(
        rollout_batch(problem),
        rows[layout.data_rank],
        sequence_multiple=layout.sequence_multiple,
        context_rank=layout.context_rank,
        context_size=layout.context_size,
    )


def pieces(shards: Any) -> list[Piece]:
    """Return sharded tensors as plain data."""
    return [
        (s.key, tuple(s.global_shape), tuple(s.global_offset), s.data.detach().double().cpu().numpy().copy())
        for s in shards
    ]


def run_reference(args: argparse.Namespace, problem: Problem) -> Outcome:
    """Run one process with one micro-batch in float64; it defines the old log-probs as its own minus the drift."""
    from fiberpo_megatron.mcore.families import read_architecture
    from fiberpo_megatron.mcore.model import build_model, draw_weights
    from fiberpo_megatron.mcore.optimizers import make_optimizer
    from fiberpo_megatron.mcore.optimizers.adam import Adam
    from fiberpo_megatron.mcore.parallel.layout import start_layout
    from fiberpo_megatron.mcore.schedule import Schedule
    from fiberpo_megatron.mcore.weights.global_tensors import global_shards, gradient_shards

    config = make_config(parse([f"--seed={args.seed}"]))
    layout = start_layout(MODELS[args.model], config.parallel, config.run)
    architecture = read_architecture(MODELS[args.model])
    models = build_model(architecture, config.model, layout, dtype=torch.float64)
    draw_weights(models, architecture, args.seed)
    (batch,) = local_micro_batches(problem, layout, None)
    index = batch.response_tokens
    seen: list[tuple[Tensor, Tensor]] = []

    def loss(_: int, log_probs: Tensor) -> Tensor:
        values = log_probs.detach()
        first = seen[0][0] if seen else values
        old = dict(zip(index.tolist(), (first.numpy() - problem.drift[index]).tolist()))
        seen.append((values, Gate(args, problem, old, index)(values, slice(0, len(values)), None)))
        return -(seen[-1][1] * log_probs).sum()

    parameters = [parameter for parameter in models[0].parameters() if parameter.requires_grad]
    adam, settings = make_optimizer(config.optimizer), config.optimizer
    assert isinstance(adam, Adam), "the reference is Adam"
    optimizer = torch.optim.AdamW(
        parameters,
        settings.learning_rate,
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
        weight_decay=settings.weight_decay,
    )
    schedule, gradient = Schedule(models, models, layout, 4096), []
    for _ in range(max(1, args.steps)):
        optimizer.zero_grad()
        schedule.forward_backward([batch], TEMPERATURE, loss)
        if not gradient:
            for parameter in parameters:
                parameter.main_grad = parameter.grad
            gradient = pieces(gradient_shards(models))
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip_grad)
        optimizer.step()
    names, (log_probs, coefficients) = index.tolist(), seen[0]
    return Outcome(
        coefficients=dict(zip(names, coefficients.tolist())),
        log_probs=dict(zip(names, log_probs.tolist())),
        gradient=gradient,
        parameters=pieces(global_shards(models)) if args.steps else [],
    )


def run_rank(args: argparse.Namespace, problem: Problem, reference: Outcome) -> Outcome:
    """Run one rank of the layout, through the policy that training uses."""
    from fiberpo_megatron.mcore.parallel.layout import start_layout
    from fiberpo_megatron.mcore.policy import build_policy
    from fiberpo_megatron.mcore.weights.global_tensors import global_shards, gradient_shards
    from fiberpo_megatron.types import Coefficients, concatenated_response_tokens

    config = make_config(args)
    layout = start_layout(MODELS[args.model], config.parallel, config.run)
    policy = build_policy(config, MODELS[args.model], layout)
    batches = local_micro_batches(problem, layout, args.micro_batch_tokens)
    index = concatenated_response_tokens(batches)
    old = {i: value - problem.drift[i] for i, value in reference.log_probs.items()}
    gate = Gate(args, problem, old, index)
    single = not gate.objective.spans_micro_batches and layout.context_size == 1
    reduce = None if single else layout.sum_over_tokens
    seen: list[tuple[Tensor, Tensor]] = []

    def coefficients(log_probs: Tensor, where: slice) -> Coefficients:
        seen.append((log_probs.detach(), gate(log_probs, where, reduce)))
        return Coefficients(seen[-1][1])

    policy.accumulate(batches, coefficients, TEMPERATURE, single_pass=single)
    log_probs, values = (torch.cat(parts).tolist() for parts in zip(*seen)) if seen else ([], [])
    gradient = pieces(gradient_shards(policy.models))
    for _ in range(args.steps):
        policy.step(batches, coefficients, TEMPERATURE, single_pass=single)
    return Outcome(
        coefficients=dict(zip(index.tolist(), values)),
        log_probs=dict(zip(index.tolist(), log_probs)),
        gradient=gradient,
        parameters=pieces(global_shards(policy.models)) if args.steps else [],
    )


def assemble(parts: Iterable[list[Piece]]) -> dict[str, NDArray[np.float64]]:
    """Return global tensors made of every rank's pieces."""
    whole: dict[str, NDArray[np.float64]] = {}
    for rank in parts:
        for key, shape, offset, values in rank:
            target = whole.setdefault(key, np.full(shape, np.nan))
            values = values.reshape((1,) * (len(shape) - values.ndim) + values.shape)
            target[tuple(slice(o, o + n) for o, n in zip(offset, values.shape))] = values
    return whole


def launch(args: argparse.Namespace, folder: Path, world_size: int, mode: str, on_cpu: bool) -> list[Outcome]:
    """Run `world_size` processes; stop them all at the deadline or when one fails."""
    # A fork has everything imported already, but is not allowed once this process has used a GPU.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    store = TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
    processes = []
    for rank in range(world_size):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # this process holds the store, so no port is guessed
            **({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}),
        }
        process = context.Process(target=run_process, args=(args, folder, mode, environment), daemon=True)
        process.start()
        processes.append(process)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
            if any(process.exitcode for process in processes):
                break
            time.sleep(0.02)
        failed = [rank for rank, process in enumerate(processes) if process.exitcode != 0]
        if failed:
            raise SystemExit(f"layout_parity: rank {failed[0]} of {world_size} failed or passed {DEADLINE_S:.0f} s")
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [pickle.loads((folder / f"{mode}-{rank}").read_bytes()) for rank in range(world_size)]


def run_process(args: argparse.Namespace, folder: Path, mode: str, environment: dict[str, str]) -> None:
    """Run one of the launched processes, which writes its outcome into the folder."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    problem = make_problem(args.seed, partitions=max(2, args.expert))
    if mode == "reference":
        outcome = run_reference(args, problem)
    else:
        outcome = run_rank(args, problem, pickle.loads((folder / "reference-0").read_bytes()))
    (folder / f"{mode}-{environment['RANK']}").write_bytes(pickle.dumps(outcome))


def compare(reference: Outcome, outcomes: list[Outcome]) -> dict[str, float]:
    """Return the largest differences, relative to the largest reference value."""
    found = {
        "coefficient_max_relative_diff": token_difference(
            reference.coefficients, [outcome.coefficients for outcome in outcomes]
        ),
        "gradient_max_relative_diff": tensor_difference(reference.gradient, [outcome.gradient for outcome in outcomes]),
        "log_prob_max_relative_diff": token_difference(
            reference.log_probs, [outcome.log_probs for outcome in outcomes]
        ),
    }
    if reference.parameters:
        found["parameter_max_relative_diff"] = tensor_difference(
            reference.parameters, [outcome.parameters for outcome in outcomes]
        )
    return found


def token_difference(wanted: dict[int, float], ranks: list[dict[int, float]]) -> float:
    """Return the largest relative difference of values by flat token index."""
    found: dict[int, float] = {}
    for rank in ranks:
        found |= rank
    assert found.keys() == wanted.keys(), "some response tokens are missing"
    return max(abs(found[i] - value) for i, value in wanted.items()) / max(abs(value) for value in wanted.values())


def tensor_difference(wanted: list[Piece], ranks: list[list[Piece]]) -> float:
    """Return the largest difference of global tensors, each relative to its own largest element."""
    worst, found = 0.0, assemble(ranks)
    for key, value in assemble([wanted]).items():
        rows = found[key][tuple(slice(0, n) for n in value.shape)]  # without the rows that pad the vocabulary
        assert np.isfinite(rows).all(), f"no rank holds all of {key}"
        size = np.abs(value).max()
        assert size or not rows.any(), f"{key} should be zero"
        worst = max(worst, float(np.abs(rows - value).max() / size) if size else 0.0)
    return worst


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("tensor", "pipeline", "virtual-pipeline", "expert", "expert-tensor", "context", "data"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--objective", default="fiberpo-domain")
    parser.add_argument("--micro-batch-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", choices=list(MODELS), default="moe")
    parser.add_argument("--steps", type=int, default=0, help="optimiser steps after which parameters are compared")
    return parser.parse_args(words)


def main() -> None:
    """Compare one layout and print the differences."""
    args = parse()
    from fiberpo_megatron.mcore.parallel.layout import check_layout

    world_size = args.tensor * args.pipeline * args.context * args.data
    try:
        check_layout(MODELS[args.model], make_config(args).parallel, world_size)
    except ValueError as error:
        raise SystemExit(f"layout_parity: {error}") from None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (reference,) = launch(args, folder, 1, "reference", on_cpu=True)
        outcomes = launch(args, folder, world_size, "rank", on_cpu=False)
    print(json.dumps(compare(reference, outcomes)))


if __name__ == "__main__":
    main()
