"""Count what the objective's reductions over the data x context ranks carry in one optimiser step."""

import warnings
from functools import cache

import torch

from fiberpo_megatron.config.schema import Config
from fiberpo_megatron.fibration import Objective, build_objective
from fiberpo_megatron.trainer.settings import AlgorithmConfig


def gate_bytes(config: Config) -> tuple[int, ...]:
    """Return the bytes of each all-reduce, per rank.

    No formula is used: the objective itself, a user's own included, is called on one token per trajectory of a
    mini-batch, with a reduction that counts. Its tables have a row per node, so their size does not depend on the
    number of tokens. Where levels name turns, the plan counts one turn per trajectory; where they name weight versions
    or engines, it counts one of them. For `apc` it counts one state that was sampled repeatedly, because how many there
    are depends on the responses; a run reports the bytes in `gate/reduce_bytes`.
    """
    return _gate_bytes(
        config.algorithm.model_dump_json(),
        config.batch.prompts // config.batch.mini_batches,
        config.batch.samples_per_prompt,
        max(1, len(config.environments)),
        config.algorithm.expert_partitions or config.parallel.expert,
    )


@cache  # the layouts of a search have the same gates
def _gate_bytes(algorithm: str, prompts: int, samples: int, domains: int, partitions: int) -> tuple[int, ...]:
    objective = _objective(AlgorithmConfig.model_validate_json(algorithm))
    count = prompts * samples
    trajectory = torch.arange(count)
    once = torch.zeros(count, dtype=torch.int64)
    keys = dict.fromkeys(objective.keys, once) | {"domain": once}
    keys |= {"trajectory": trajectory, "turn": trajectory, "prompt_group": trajectory // samples}
    counts = dict.fromkeys(keys, 1) | {"domain": domains}
    counts |= {"trajectory": count, "turn": count, "prompt_group": prompts}
    sent: list[int] = []
    objective(
        torch.zeros(count),
        torch.zeros(count),
        torch.full((count,), 1.0 / count),
        keys=keys,
        counts=counts,
        expert_share=torch.full((count, partitions), 1.0 / partitions) if objective.uses_experts else None,
        reduce=lambda table: sent.append(table.nbytes),
    )
    return tuple(sent)


def spans_micro_batches(config: Config) -> bool:
    """Return whether an optimiser step needs a forward of its own for the gates (docs/architecture.md, Exactness)."""
    return _objective(config.algorithm).spans_micro_batches


def _objective(algorithm: AlgorithmConfig) -> Objective:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about budgets belongs to the start of a run
        return build_objective(algorithm.objective.use, **algorithm.objective_options())
