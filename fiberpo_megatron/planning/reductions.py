"""Count what the objective's reductions over the data x context ranks carry in one optimiser step."""

from collections.abc import Sequence
from functools import cache

import torch

from fiberpo_megatron.config.schema import Config
from fiberpo_megatron.fibration import FiberPO, Objective, build_objective
from fiberpo_megatron.trainer.settings import AlgorithmConfig
from fiberpo_megatron.user_warnings import nowhere, warnings_to

LABELLED = ("turn", "version", "engine")
"""Keys whose ids a run gives numbers of their own, which budgets list; here all have the number 0."""


def gate_bytes(config: Config) -> tuple[int, ...]:
    """Return the bytes of each all-reduce, per rank.

    No formula is used: the objective itself, a user's own included, is called on one token per trajectory of a
    mini-batch, with a reduction that counts. Its tables have a row per node, so their size does not depend on the
    number of tokens. Where levels name turns, the plan counts one turn per trajectory; where they name weight versions
    or engines, it counts one of them. For `apc` it counts one state that was sampled repeatedly, because how many there
    are depends on the responses; a run reports the bytes in `gate/reduce_bytes`. The off-policy mask's table of two
    numbers per trajectory goes before the objective's; a few numbers of the terms' metrics are not counted.
    """
    return _gate_bytes(
        config.algorithm.model_dump_json(),
        _domains(config),
        config.batch.prompts // config.batch.mini_batches,
        config.batch.samples_per_prompt,
        config.algorithm.expert_partitions or config.parallel.expert,
    )


@cache  # the layouts of a search have the same gates
def _gate_bytes(
    algorithm: str, domains: tuple[str, ...], prompts: int, samples: int, partitions: int
) -> tuple[int, ...]:
    settings = AlgorithmConfig.model_validate_json(algorithm)
    objective = _objective(settings, domains)
    if isinstance(objective, FiberPO):  # a run refuses a layout with fewer expert partitions than the budgets list
        partitions = max((partitions, *(number + 1 for number in objective.tree.listed().get("expert", ()))))
    count = prompts * samples
    trajectory = torch.arange(count)
    once = torch.zeros(count, dtype=torch.int64)
    keys = dict.fromkeys(objective.keys, once) | {"domain": once}
    keys |= {"trajectory": trajectory, "turn": trajectory, "prompt_group": trajectory // samples}
    counts = dict.fromkeys(keys, 1) | {"domain": max(1, len(domains))}
    counts |= {"trajectory": count, "turn": count, "prompt_group": prompts}
    masks = settings.off_policy_mask.delta is not None
    sent: list[int] = [2 * count * torch.float64.itemsize] if masks else []
    objective(
        torch.zeros(count),
        torch.zeros(count),
        torch.full((count,), 1.0 / count),
        keys=keys,
        counts=counts,
        labels={key: torch.zeros(counts[key], dtype=torch.int64) for key in LABELLED if key in keys},
        expert_share=torch.full((count, partitions), 1.0 / partitions) if objective.uses_experts else None,
        old_log_probs=torch.zeros(count),
        reduce=lambda table: sent.append(table.nbytes),
    )
    return tuple(sent)


def spans_micro_batches(config: Config) -> bool:
    """Return whether an optimiser step needs a forward of its own for the gates (docs/architecture.md, Exactness)."""
    return _objective(config.algorithm, _domains(config)).spans_micro_batches


def uses_experts(config: Config) -> bool:
    """Return whether the objective has a level of expert partitions, so that a run records expert routing."""
    return _uses_experts(config.algorithm.model_dump_json(), _domains(config))


@cache
def _uses_experts(algorithm: str, domains: tuple[str, ...]) -> bool:
    return _objective(AlgorithmConfig.model_validate_json(algorithm), domains).uses_experts


def _domains(config: Config) -> tuple[str, ...]:
    return tuple(environment.name for environment in config.environments)


def _objective(algorithm: AlgorithmConfig, domains: Sequence[str]) -> Objective:
    with warnings_to(nowhere):  # advice about budgets belongs to the start of a run
        return build_objective(algorithm.objective.use, **algorithm.objective_options(domains))
