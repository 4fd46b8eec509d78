"""This module has a run's tasks on every rank: environments on the leaders, the stream of prompts, their tokens."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from fiberpo_megatron.config import Config, ConfigError
from fiberpo_megatron.data.curriculum import build_prompts
from fiberpo_megatron.data.encoding import Encoder, Example
from fiberpo_megatron.data.prompts import Place, PromptSets
from fiberpo_megatron.data.tokenizer import load_tokenizer
from fiberpo_megatron.environments.settings import EnvironmentConfig
from fiberpo_megatron.evaluation.settings import EvaluationSet
from fiberpo_megatron.interfaces import Layout
from fiberpo_megatron.rollout.environments import EnvironmentFacts, Environments
from fiberpo_megatron.rollout.generator import share
from fiberpo_megatron.together import together
from fiberpo_megatron.trainer.sft import supervised_batch
from fiberpo_megatron.types import RolloutBatch


@dataclass(frozen=True)
class Tasks:
    """They are the tasks of a run, as one rank sees them."""

    layout: Layout
    facts: list[EnvironmentFacts]
    prompts: PromptSets
    encoder: Encoder
    environments: Environments | None
    """None on ranks that lead no data-parallel replica: they need no task."""
    sets: Mapping[str, Sequence[Place]]
    """The places of each evaluation set."""

    @property
    def all_names(self) -> Sequence[str]:
        """These are the names of the environments, and behind them those of the ones that only sets use."""
        return self.encoder.names

    @property
    def names(self) -> Sequence[str]:
        """These are the names of the environments."""
        return self.prompts.domains

    def example_batch(self, seed: int, step: int, count: int) -> RolloutBatch:
        """Return the supervised examples of a step as trajectories, equal on every rank."""
        places = self.prompts.examples_at(seed, step, count)
        examples: list[Example] = []
        with together(self.layout, f"reading the examples of step {step}"):
            if self.environments is not None:
                mine = share(places, self.layout.data_rank, self.layout.data_size)
                examples = self.environments.examples(mine, self.encoder)
        return self.layout.gather_rollouts(supervised_batch(examples) if self.layout.is_leader else None)


@contextmanager
def start_tasks(config: Config, hf_config: Mapping[str, Any], layout: Layout) -> Iterator[Tasks]:
    """Start the environments on every leader and yield the run's tasks, checked; the workers end with the context.

    Raises ConfigError for an environment that cannot be used, or that has other tasks on another machine.
    """
    environments: Environments | None = None
    try:
        with together(layout, "starting the environments"):
            if not config.environments:
                raise ConfigError("there are no environments; add [[environments]] with `name` and `use` to the config")
            tokenizer = load_tokenizer(config.model.path)
            if layout.is_leader:
                folder = config.run.folder / "environments"
                environments = Environments(
                    config.environments,
                    folder=folder,
                    rank=layout.rank,
                    evaluated=config.evaluation.own_environments,
                )
        mine = None if environments is None else [asdict(fact) for fact in environments.facts]
        first = layout.share_text(json.dumps(mine) if layout.rank == 0 else None)
        facts = [EnvironmentFacts(**fact) for fact in json.loads(first)]
        everything = [*config.environments, *config.evaluation.own_environments]
        names = [environment.name for environment in everything]
        prompts = build_prompts(config.data, [fact.domain(e) for fact, e in zip(facts, config.environments)])
        encoder = Encoder(
            tokenizer,
            names,
            [fact.chat_template_kwargs for fact in facts],
            model=config.model.path,
            vocabulary=int(hf_config["vocab_size"]),
            max_prompt_tokens=config.data.max_prompt_tokens,
            skip_long_prompts=config.data.long_prompts == "skip",
            stop=config.rollout.stop,
            tools=config.rollout.tool_call_parser is not None,
        )
        with together(layout, "checking the tasks"):
            if environments is not None:
                _same_everywhere(facts, environments.facts, everything)
                environments.check(encoder, config.data.checked_prompts)
        sets = {one.name: places_of(one, names, facts) for one in config.evaluation.sets}
        yield Tasks(layout, facts, prompts, encoder, environments, sets)
    finally:
        if environments is not None:
            environments.close()


def places_of(of: EvaluationSet, names: Sequence[str], facts: Sequence[EnvironmentFacts]) -> list[Place]:
    """Return the places of an evaluation set. `names` and `facts` are those of all environments, in the order of
    `Place.domain`. Raises ConfigError when the set has no task."""
    domain = names.index(of.environment_name)
    size = facts[domain].train_size if of.split == "train" else facts[domain].held_out_size
    if not size:
        other = "held_out" if of.split == "train" else "train"
        raise ConfigError(
            f"evaluation set {of.name!r}: the environment {of.environment_name!r} has no task in the split "
            f'"{of.split}"; give it some, or set split = "{other}"'
        )
    return [Place(domain, of.split, index) for index in range(min(size, of.prompts or size))]


def _same_everywhere(
    first: Sequence[EnvironmentFacts], mine: Sequence[EnvironmentFacts], configs: Sequence[EnvironmentConfig]
) -> None:
    for environment, theirs, ours in zip(configs, first, mine):
        if json.dumps(asdict(theirs), sort_keys=True) != json.dumps(asdict(ours), sort_keys=True):
            raise ConfigError(
                f"environments: {environment.name!r} differs between machines: {theirs} on rank 0, {ours} here; give "
                "all machines the same files and packages"
            )
