"""This module calls the config's objective on the tokens of a timed micro-batch, as an optimiser step does."""

import torch
from torch import Tensor

from fiberpo_megatron.config import Config
from fiberpo_megatron.fibration import build_objective
from fiberpo_megatron.mcore.parallel.layout import ParallelLayout
from fiberpo_megatron.planning.reductions import LABELLED
from fiberpo_megatron.types import Coefficients, Gate, MicroBatch
from fiberpo_megatron.user_warnings import nowhere, warnings_to


def objective_gate(
    config: Config, layout: ParallelLayout, batch: MicroBatch, length: int, old_log_probs: Tensor
) -> Gate:
    """Return the gate of a step on one micro-batch of every data-parallel rank, whose sequences have `length` inputs.

    Every sequence is a trajectory of one turn and a prompt of its own; advantages are +1 and -1 in turn. The routing
    of tokens is taken to be even.
    """
    domains = [environment.name for environment in config.environments]
    with warnings_to(nowhere):  # advice about budgets belongs to the start of a run
        objective = build_objective(config.algorithm.objective.use, **config.algorithm.objective_options(domains))
    each = len(batch.cu_seqlens) - 1
    trajectory = layout.data_rank * each + batch.response_tokens // (length + 1)
    once, count = torch.zeros_like(trajectory), each * layout.data_size
    keys = dict.fromkeys(objective.keys, once) | {"domain": once}
    keys |= dict.fromkeys(("trajectory", "turn", "prompt_group"), trajectory)
    counts = dict.fromkeys(keys, 1) | dict.fromkeys(("trajectory", "turn", "prompt_group"), count)
    labels = {key: torch.zeros(counts[key], dtype=torch.int64) for key in LABELLED if key in keys}
    tokens = len(trajectory)
    advantages = 1.0 - 2.0 * (trajectory % 2)
    weights = torch.full((tokens,), 1.0 / max(1, tokens * layout.data_size * layout.context_size))
    partitions = config.algorithm.expert_partitions or config.parallel.expert
    share = torch.full((tokens, partitions), 1.0 / partitions) if objective.uses_experts else None

    def gate(log_probs: Tensor, part: slice) -> Coefficients:
        device = log_probs.device

        def here(tensor: Tensor) -> Tensor:
            return tensor[part].to(device)

        out = objective(
            log_probs.detach() - here(old_log_probs),
            here(advantages),
            here(weights),
            keys={name: here(ids) for name, ids in keys.items()},
            counts=counts,
            labels=labels,
            expert_share=None if share is None else here(share),
            old_log_probs=here(old_log_probs),
            reduce=layout.sum_over_tokens,
        )
        return Coefficients(out.gradient, {} if out.metrics is None else out.metrics.as_dict())

    return gate
