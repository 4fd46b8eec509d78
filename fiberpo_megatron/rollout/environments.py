"""This module has the environments of a run as the trainer sees them: worker processes, and tasks as prompts."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from fiberpo_megatron.config import ConfigError
from fiberpo_megatron.data.encoding import Encoder, Example, PromptTooLong
from fiberpo_megatron.data.prompts import Domain, Place
from fiberpo_megatron.engines.background import BackgroundLoop
from fiberpo_megatron.environments import Outcome, Split, Task, Trajectory, Turn
from fiberpo_megatron.environments.budget import StepBudget
from fiberpo_megatron.environments.host import Description, EnvironmentPool, Failure
from fiberpo_megatron.environments.jobs import Say
from fiberpo_megatron.environments.settings import EnvironmentConfig
from fiberpo_megatron.types import Prompt

BATCH = 256
"""Tasks that are asked for at once."""
LONG_IN_A_ROW = 1000
"""Training tasks in a row whose prompts may be too long."""


@dataclass(frozen=True)
class EnvironmentFacts:
    """These are the facts about an environment that every rank knows."""

    train_size: int
    held_out_size: int
    chat_template_kwargs: Mapping[str, Any]
    path: str
    version: str | None

    def domain(self, config: EnvironmentConfig) -> Domain:
        """Return what the stream of prompts has to know."""
        return Domain(
            config.name,
            config.weight,
            self.train_size,
            self.held_out_size,
            config.curriculum_steps,
            config.curriculum_start,
        )


class Workers(Protocol):
    """They do an environment's work; `environments.host.EnvironmentPool` is the real one."""

    async def tasks(self, split: Split, indices: Sequence[int]) -> list[Task]: ...

    async def score(
        self, task: Task, turn: Turn, *, seed: int, sample: int | None = None, budget: StepBudget | None = None
    ) -> Outcome | Failure: ...

    async def run(
        self,
        task: Task,
        converse: Callable[[], Say],
        *,
        seed: int,
        sample: int | None = None,
        budget: StepBudget | None = None,
        sampling: Mapping[str, float] | None = None,
    ) -> Outcome | Failure: ...

    async def score_group(
        self, task: Task, trajectories: Sequence[Trajectory], *, seed: int, budget: StepBudget | None = None
    ) -> list[Outcome] | Failure: ...

    def take_counts(self) -> Mapping[str, int]: ...

    async def close(self) -> None: ...


@dataclass(frozen=True)
class RunningEnvironment:
    """It is an environment whose workers run."""

    config: EnvironmentConfig
    description: Description
    pool: Workers

    def step_budget(self, prompts: int, samples: int) -> StepBudget:
        """Return the time of one step in which each of `prompts` prompts has `samples` trajectories."""
        calls = prompts * samples + prompts * self.description.scores_groups
        return StepBudget(self.config.step_seconds, workers=self.config.workers, calls=calls)


class Environments:
    """These are the workers of all environments, on one data-parallel leader. Close it when done.

    `folder`: gets their logs and the records of failures. `rank`: this process, for the names of the files.
    `evaluated`: environments that only evaluation sets use. They come behind the others and need no training task.
    """

    def __init__(
        self,
        configs: Sequence[EnvironmentConfig],
        *,
        folder: Path | None,
        rank: int,
        evaluated: Sequence[EnvironmentConfig] = (),
    ) -> None:
        self.loop = BackgroundLoop("environments")
        self.running: list[RunningEnvironment] = []
        self._rank = rank
        self._skipped: Counter[int] = Counter()
        """Training tasks that were skipped, by the number of their environment."""
        try:
            for config in (*configs, *evaluated):
                pool = EnvironmentPool(config, folder=folder, rank=rank)
                self.running.append(RunningEnvironment(config, self.loop.run(pool.start()), pool))
                if len(self.running) <= len(configs) and self.running[-1].description.train_size < 1:
                    raise ConfigError(f"environments: {config.name!r} has no training task (train_size is below 1)")
        except BaseException:
            self.close()
            raise

    @property
    def facts(self) -> list[EnvironmentFacts]:
        """This is what every rank has to know, by environment."""
        return [
            EnvironmentFacts(d.train_size, d.held_out_size, dict(d.chat_template_kwargs), d.path, d.version)
            for d in (environment.description for environment in self.running)
        ]

    def tasks(self, places: Sequence[Place]) -> list[Task]:
        """Return the tasks at these places, in order."""
        wanted: dict[tuple[int, Split], list[int]] = {}
        for place in places:
            wanted.setdefault((place.domain, place.split), []).append(place.index)
        found: dict[Place, Task] = {}
        for (domain, split), indices in wanted.items():
            different = sorted(set(indices))
            for begin in range(0, len(different), BATCH):
                part = different[begin : begin + BATCH]
                tasks = self.loop.run(self.running[domain].pool.tasks(split, part))
                found |= {Place(domain, split, index): task for index, task in zip(part, tasks, strict=True)}
        return [found[place] for place in places]

    def prompts(self, places: Sequence[Place], encoder: Encoder) -> list[Prompt]:
        """Return the prompts at these places, in order.

        Where the encoder skips long prompts, the next training task that fits takes the place of one that is too long:
        what is drawn stays a pure function of the place.
        """
        return [self._prompt(place, task, encoder) for place, task in zip(places, self.tasks(places), strict=True)]

    def _prompt(self, place: Place, task: Task, encoder: Encoder) -> Prompt:
        try:
            return encoder.prompt(place, task)
        except PromptTooLong as error:
            if place.split != "train" or not encoder.skip_long_prompts:
                raise
            size = self.running[place.domain].description.train_size
            for more in range(1, min(size, LONG_IN_A_ROW)):
                other = replace(place, index=(place.index + more) % size)
                with suppress(PromptTooLong):
                    found = encoder.prompt(other, self.tasks([other])[0])
                    self._skipped[place.domain] += 1
                    return found
            raise ValueError(
                f"the prompts of {min(size, LONG_IN_A_ROW)} training tasks in a row are too long, so that "
                f'data.long_prompts = "skip" finds no other; raise data.max_prompt_tokens. The first of them: {error}'
            ) from error

    def examples(self, places: Sequence[Place], encoder: Encoder) -> list[Example]:
        """Return supervised examples at these places, in order."""
        return [encoder.example(prompt) for prompt in self.prompts(places, encoder)]

    def check(self, encoder: Encoder, most: int = 10_000) -> None:
        """Read tasks and tokenise their prompts, so that what would fail at some later step fails now.

        Of environments whose tasks stand in files (`check_all_tasks`), `most` of each split are read, evenly spread
        over it; of others the first task.
        """
        for domain, found in enumerate(environment.description for environment in self.running):
            for split, size in (("train", found.train_size), ("held_out", found.held_out_size)):
                count = min(most if found.check_all_tasks else 1, size)
                for begin in range(0, count, BATCH):
                    indices = [k * size // count for k in range(begin, min(begin + BATCH, count))]
                    self.prompts([Place(domain, split, index) for index in indices], encoder)  # type: ignore[arg-type]
            if not found.single_turn:
                encoder.check_conversations(domain)
        self._skipped.clear()

    def take_metrics(self) -> dict[str, float]:
        """Return counts since the last call, as metrics: failures by kind, trajectories that started again, and tasks
        that were skipped because their prompts are too long (every leader reads the same tasks; rank 0 counts)."""
        counts = {
            f"environment/{environment.config.name}/{name}": float(count)
            for environment in self.running
            for name, count in environment.pool.take_counts().items()
        }
        for domain, count in self._skipped.items() if self._rank == 0 else ():
            counts[f"environment/{self.running[domain].config.name}/long_prompts"] = float(count)
        self._skipped.clear()
        return counts

    def close(self) -> None:
        """End the workers; idempotent."""
        while self.running:
            self.loop.run(self.running.pop().pool.close())
        self.loop.close()
