"""What the objective's reductions over the data x context ranks carry in one optimiser step."""

import torch

from fiberpo_megatron.config.schema import Config
from fiberpo_megatron.fibration import build_objective


def gate_bytes(config: Config) -> tuple[int, ...]:
    """Bytes of each all-reduce, per rank.

    Not a formula: the objective itself is called on one token per trajectory of a mini-batch, with a reduction that
    counts. Its tables have a row per node, so their size does not depend on the number of tokens.
    """
    objective = build_objective(config.algorithm.objective, **config.algorithm.objective_options())  # type: ignore[arg-type]
    prompts, samples = config.batch.prompts // config.batch.mini_batches, config.batch.samples_per_prompt
    count = prompts * samples
    trajectory = torch.arange(count)
    group = trajectory // samples
    partitions = config.algorithm.expert_partitions or config.parallel.expert
    sent: list[int] = []
    objective(
        torch.zeros(count),
        torch.zeros(count),
        torch.full((count,), 1.0 / count),
        keys={"trajectory": trajectory, "prompt_group": group, "domain": torch.zeros_like(group)},
        counts={"trajectory": count, "prompt_group": prompts, "domain": len(config.data.tasks)},
        expert_share=torch.full((count, partitions), 1.0 / partitions) if objective.uses_experts else None,
        reduce=lambda table: sent.append(table.nbytes),
    )
    return tuple(sent)


def spans_micro_batches(config: Config) -> bool:
    """Whether an optimiser step needs a forward pass of its own for the gates (docs/architecture.md, Exactness)."""
    objective = build_objective(config.algorithm.objective, **config.algorithm.objective_options())  # type: ignore[arg-type]
    return objective.spans_micro_batches
