"""Runs of the policy on one layout, returned as global tensors so that layouts can be compared."""

import json
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import p2p_communication
from numpy.typing import NDArray
from torch import Tensor

from fiberpo_megatron.config.schema import Config
from fiberpo_megatron.data.packing import assign_rows, pack, padded_lengths
from fiberpo_megatron.mcore import policy as policy_module
from fiberpo_megatron.mcore.model import PolicyModel
from fiberpo_megatron.mcore.optimizers import build
from fiberpo_megatron.mcore.parallel.checks import check_layout
from fiberpo_megatron.mcore.parallel.layout import ParallelLayout, start_layout
from fiberpo_megatron.mcore.policy import MegatronPolicy, build_policy
from fiberpo_megatron.mcore.weights import save_hf
from fiberpo_megatron.mcore.weights.global_tensors import global_shards, gradient_shards
from fiberpo_megatron.types import Coefficients, Gate, MicroBatch, RolloutBatch, concatenated_response_tokens

TEMPERATURE = 0.7
QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 51,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": 0.1,
}
DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 51,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": 0.1,
}
"""Latent attention, a dense first layer, shared experts, a sigmoid router that is limited to groups of experts."""

_NO_EXPERTS = {k: v for k, v in QWEN3_MOE.items() if "expert" not in k and "moe_" not in k and "topk" not in k}

MODELS: dict[str, dict[str, Any]] = {
    "moe": QWEN3_MOE,
    "moe tied": {**QWEN3_MOE, "tie_word_embeddings": True},
    "dense": {**_NO_EXPERTS, "model_type": "qwen2"},
    "dense tied": {**_NO_EXPERTS, "model_type": "qwen3", "tie_word_embeddings": True},
    "deepseek": DEEPSEEK_V3,
}
"""Hugging Face configs by kind. qwen2 has biases in its projections, qwen3 norms on queries and keys."""

Piece = tuple[str, tuple[int, ...], tuple[int, ...], NDArray[Any]]


@dataclass(frozen=True)
class Case:
    """One run of one model on a layout."""

    model: str
    """Key of MODELS."""
    distributed_optimizer: bool = False
    batch: str = "mixed"
    """Key of LENGTHS."""
    budget: int | None = 72
    """Token budget of a micro-batch; None puts everything into one. The longest trajectory takes 63 positions,
    all together 188."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the config's [model]."""
    kept_forwards: int = 1
    """Of the config's [batch]."""


@dataclass
class Run:
    """What one rank returns."""

    log_probs: dict[int, float]
    """By flat token index; empty away from the last pipeline stage."""
    entropy: dict[int, float]
    gradients: dict[str, list[Piece]]
    """By name of the gate: pieces of the global gradient."""
    parameters: list[Piece]
    """Pieces of the global parameters after the steps."""
    micro_batches: int
    norms: list[float]


LENGTHS = {
    "mixed": (3, 41, 7, 2, 64, 5, 5, 19, 33, 4, 11, 6),
    "single": (41,),
}
"""Tokens of each trajectory, prompt included, by name of the batch. "single" leaves every data-parallel rank but one
without any."""


def make_batch(seed: int = 0, vocab: int = 51, name: str = "mixed") -> RolloutBatch:
    """Trajectories of very different lengths, one with a single response token, the long ones with several turns."""
    rng = np.random.default_rng(seed)
    lengths = np.array(LENGTHS[name], dtype=np.int64)
    mask = np.concatenate([(np.arange(n) >= max(1, n // 3)) & (np.arange(n) % 16 < 13) for n in lengths])
    count = len(lengths)
    return RolloutBatch.filled(
        tokens=rng.integers(0, vocab, int(lengths.sum())),
        response_mask=mask,
        rollout_log_probs=np.zeros(len(mask), dtype=np.float32),
        lengths=lengths,
        rewards=rng.random(count).astype(np.float32),
        correct=np.zeros(count, dtype=bool),
        groups=np.arange(count) // 3,
        domains=np.zeros(count, dtype=np.int64),
        truncated=np.zeros(count, dtype=bool),
    )


def make_config(**sections: Any) -> Config:
    """A float32 config with a trained router; `sections` override."""
    base: dict[str, Any] = {
        "run": {"distributed_timeout_s": 60.0},
        "model": {"path": "unused", "random_init": True, "dtype": "float32", "train_router": True},
        # Gradients are about 1e-3: an eps of that size keeps Adam from turning rounding noise into whole steps.
        "optimizer": {"learning_rate": 1e-2, "eps": 1e-3, "clip_grad": 0.03},
    }
    for section, values in sections.items():
        base[section] = {**base.get(section, {}), **values}
    return Config.model_validate(base)


def micro_batches_for(batch: RolloutBatch, layout: ParallelLayout, budget: int | None) -> list[MicroBatch]:
    """This rank's rows; `budget` None puts everything into one row."""
    sizes = padded_lengths(batch.lengths, layout.sequence_multiple)
    budget = budget or int(sizes.sum())
    rows = assign_rows(sizes, layout.data_size, budget)[layout.data_rank]
    return pack(
        batch,
        rows,
        sequence_multiple=layout.sequence_multiple,
        context_rank=layout.context_rank,
        context_size=layout.context_size,
    )


def loss_weights(tokens: int) -> NDArray[Any]:
    """[N] random coefficients by flat token index."""
    return np.random.default_rng(1).normal(size=tokens) / tokens


def fixed_gate(micro_batches: list[MicroBatch], tokens: int) -> Gate:
    """Fixed random coefficients by flat token index: the same for any layout and any order of calls."""
    mine = torch.from_numpy(loss_weights(tokens))[concatenated_response_tokens(micro_batches)]
    return lambda log_probs, where: Coefficients(mine[where])


def coupled_gate(micro_batches: list[MicroBatch], tokens: int, layout: ParallelLayout) -> Gate:
    """Coefficients that depend on the log-probs of every token of every rank."""
    fixed = fixed_gate(micro_batches, tokens)

    def gate(log_probs: Tensor, where: slice) -> Coefficients:
        weights = fixed(log_probs, where).gradient
        total = layout.sum_over_tokens((weights * log_probs.double()).sum())
        return Coefficients(weights * (1 + torch.tanh(total)) * log_probs.double().exp())

    return gate


def pieces(shards: Iterable[Any]) -> list[Piece]:
    """ShardedTensors as (key, global shape, global offset, array without the prepended axes)."""
    return [
        (s.key, tuple(s.global_shape), tuple(s.global_offset), s.data.detach().double().numpy().copy()) for s in shards
    ]


def assemble(per_rank: Iterable[list[Piece]]) -> dict[str, NDArray[Any]]:
    """Global tensors from all ranks' pieces; replicas must agree bitwise."""
    out: dict[str, NDArray[Any]] = {}
    filled: dict[str, NDArray[Any]] = {}
    for rank_pieces in per_rank:
        for key, shape, offset, data in rank_pieces:
            target = out.setdefault(key, np.zeros(shape))
            mask = filled.setdefault(key, np.zeros(shape, dtype=bool))
            data = data.reshape((1,) * (len(shape) - data.ndim) + data.shape)
            at = tuple(slice(start, start + size) for start, size in zip(offset, data.shape))
            if mask[at].all():
                np.testing.assert_array_equal(target[at], data, err_msg=f"replicas of {key} differ")
            target[at], mask[at] = data, True
    assert all(mask.all() for mask in filled.values()), [k for k, m in filled.items() if not m.all()]
    return out


def whole_gradients(policy: MegatronPolicy) -> None:
    """Complete the gradient buffers, of which the distributed optimizer leaves each rank one shard."""
    for chunk in policy.chunks:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            for bucket in buffer.buckets if buffer.ddp_config.use_distributed_optimizer else []:
                shards = list(bucket.grad_data.chunk(buffer.data_parallel_world_size))
                own = shards[buffer.data_parallel_group.rank()].clone()
                dist.all_gather(shards, own, group=buffer.data_parallel_group)


def run_case(case: Case, folder: Path, parallel: dict[str, int], layout: ParallelLayout) -> Run:
    """Scores, gradients of both gates and parameters after three optimiser steps, from the checkpoint in `folder`."""
    hf_config = MODELS[case.model]
    config = make_config(
        parallel={**parallel, "distributed_optimizer": case.distributed_optimizer},
        model={"path": folder / case.model, "random_init": False, **case.options},
        batch={"kept_forwards": case.kept_forwards},
    )
    check_layout(hf_config, config.parallel, layout.world_size)
    batch = make_batch(vocab=hf_config["vocab_size"], name=case.batch)
    batches = micro_batches_for(batch, layout, case.budget)
    tokens = len(batch.tokens)
    policy = build_policy(config, hf_config, layout)
    scores = policy.log_probs(batches, TEMPERATURE)
    index = concatenated_response_tokens(batches).tolist()
    gates = {"fixed": fixed_gate(batches, tokens), "coupled": coupled_gate(batches, tokens, layout)}
    gradients = {}
    for name, gate in gates.items():
        policy.accumulate(batches, gate, TEMPERATURE, single_pass=name == "fixed")
        whole_gradients(policy)
        gradients[name] = pieces(gradient_shards(policy.models))
    norms = [policy.step(batches, gates["coupled"], TEMPERATURE).gradient_norm for _ in range(3)]
    policy.gather.finish()
    return Run(
        log_probs=dict(zip(index, scores.log_probs.tolist())) if scores else {},
        entropy=dict(zip(index, scores.entropy.tolist())) if scores else {},
        gradients=gradients,
        parameters=pieces(global_shards(policy.models)),
        micro_batches=len(batches),
        norms=norms,
    )


def run_without_expert_marks(cases: list[Case], folder: Path, parallel: dict[str, int]) -> list[Run]:
    """As `run_cases`, but Megatron takes the experts' parameters for ordinary ones."""
    build = policy_module.build_model

    def unmarked(*args: Any, **options: Any) -> list[PolicyModel]:
        models = build(*args, **options)
        for parameter in (parameter for model in models for parameter in model.parameters()):
            parameter.allreduce = True
        return models

    policy_module.build_model = unmarked  # in this process alone, which ends with the run
    return run_cases(cases, folder, parallel)


def run_in_small_buckets(cases: list[Case], folder: Path, parallel: dict[str, int]) -> list[Run]:
    """As `run_cases`, but where communication overlaps with computation each model has many buckets."""
    build.BUCKET_ELEMENTS = 2000  # in this process alone, which ends with the run
    return run_cases(cases, folder, parallel)


class _Later:
    """The handle of a receive that another thread posts."""

    def __init__(self, posted: "Future[dist.Work]") -> None:
        self._posted = posted

    def wait(self) -> None:
        self._posted.result().wait()


def run_with_late_receives(cases: list[Case], folder: Path, parallel: dict[str, int]) -> list[Run]:
    """As `run_cases`, but what an odd pipeline stage sends is fetched from its memory some milliseconds later. Megatron
    gives two stages the world's group for that direction, and messages of different groups are in no order."""
    thread, irecv = ThreadPoolExecutor(1), dist.irecv

    def late(tensor: Tensor, src: int, group: dist.ProcessGroup) -> Any:
        def post() -> dist.Work:
            time.sleep(0.005)
            return irecv(tensor=tensor, src=src, group=group)

        return _Later(thread.submit(post)) if group is dist.group.WORLD else irecv(tensor=tensor, src=src, group=group)

    ops = p2p_communication._p2p_ops

    def late_ops(**tensors: Any) -> Any:
        dist.irecv = late  # not for good: Megatron's batched calls want torch's own
        try:
            return ops(**tensors)
        finally:
            dist.irecv = irecv

    p2p_communication._p2p_ops = late_ops  # in this process alone, which ends with the run
    return run_cases(cases, folder, parallel)


def run_cases(cases: list[Case], folder: Path, parallel: dict[str, int]) -> list[Run]:
    """Every case on one layout, one after the other in the same process groups."""
    config = make_config(parallel=parallel)
    layout = start_layout(MODELS[cases[0].model], config.parallel, config.run)
    return [run_case(case, folder, parallel, layout) for case in cases]


@torch.no_grad()
def shake_vectors(policy: MegatronPolicy) -> None:
    """Move norms from 1, and biases (also those of the routers) from 0, so that they take part in the comparison."""
    generator = torch.Generator().manual_seed(5)
    for model in policy.models:
        for _, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor += 0.05 * torch.randn(tensor.shape, generator=generator)


def write_checkpoints(folder: Path) -> None:
    """One Hugging Face folder for each of MODELS, with drawn weights; one process."""
    config = make_config()
    layout = start_layout(QWEN3_MOE, config.parallel, config.run)
    for name, hf_config in MODELS.items():
        source = folder / f"config of {name}"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(hf_config))
        policy = build_policy(config, hf_config, layout)
        shake_vectors(policy)
        save_hf(policy.weights.full(), folder / name, source)
