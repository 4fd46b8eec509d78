"""What the objective's reductions over the data x context ranks carry in one optimiser step."""

import warnings
from functools import cache

import torch

from fiberpo_megatron.config.schema import Config
from fiberpo_megatron.fibration import Objective, build_objective
from fiberpo_megatron.trainer.settings import AlgorithmConfig


def gate_bytes(config: Config) -> tuple[int, ...]:
    """Bytes of each all-reduce, per rank.

    Not a formula: the objective itself is called on one token per trajectory of a mini-batch, with a reduction that
    counts. Its tables have a row per node, so their size does not depend on the number of tokens.
    """
    return _gate_bytes(
        config.algorithm.model_dump_json(),
        config.batch.prompts // config.batch.mini_batches,
        config.batch.samples_per_prompt,
        len(config.data.tasks),
        config.algorithm.expert_partitions or config.parallel.expert,
    )


@cache  # the layouts of a search have the same gates
def _gate_bytes(algorithm: str, prompts: int, samples: int, domains: int, partitions: int) -> tuple[int, ...]:
    objective = _objective(AlgorithmConfig.model_validate_json(algorithm))
    count = prompts * samples
    trajectory = torch.arange(count)
    group = trajectory // samples
    sent: list[int] = []
    objective(
        torch.zeros(count),
        torch.zeros(count),
        torch.full((count,), 1.0 / count),
        keys={"trajectory": trajectory, "prompt_group": group, "domain": torch.zeros_like(group)},
        counts={"trajectory": count, "prompt_group": prompts, "domain": domains},
        expert_share=torch.full((count, partitions), 1.0 / partitions) if objective.uses_experts else None,
        reduce=lambda table: sent.append(table.nbytes),
    )
    return tuple(sent)


def spans_micro_batches(config: Config) -> bool:
    """Whether an optimiser step needs a forward pass of its own for the gates (docs/architecture.md, Exactness)."""
    return _objective(config.algorithm).spans_micro_batches


def _objective(algorithm: AlgorithmConfig) -> Objective:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about budgets belongs to the start of a run
        return build_objective(algorithm.objective, **algorithm.objective_options())  # type: ignore[arg-type]
