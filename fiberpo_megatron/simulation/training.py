"""This module runs one process of a simulated training: production's own loop over simulated collaborators."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import blake2b
from typing import Any

from fiberpo_megatron.config import Config
from fiberpo_megatron.data.prompts import Domain, Place, PromptSets
from fiberpo_megatron.engines.client import Sampling
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.environments import Message, Outcome, Split, Task, Turn
from fiberpo_megatron.environments import Trajectory as EnvironmentTrajectory
from fiberpo_megatron.environments.budget import StepBudget
from fiberpo_megatron.environments.host import Description, Failure
from fiberpo_megatron.environments.jobs import Say
from fiberpo_megatron.environments.settings import EnvironmentConfig
from fiberpo_megatron.fibration import Objective, build_objective
from fiberpo_megatron.interfaces import AdvantageEstimator
from fiberpo_megatron.rollout.environments import RunningEnvironment
from fiberpo_megatron.rollout.filter import Filter
from fiberpo_megatron.rollout.fleet import Fleet
from fiberpo_megatron.rollout.generator import Generator, Sampled
from fiberpo_megatron.rollout.producer import Groups, Keep
from fiberpo_megatron.rollout.sampler import EngineSampler
from fiberpo_megatron.rollout.tickets import Tickets
from fiberpo_megatron.simulation import invariants
from fiberpo_megatron.simulation.engines import digest
from fiberpo_megatron.simulation.policy import VOCABULARY, Saves, TablePolicy
from fiberpo_megatron.simulation.scenario import Scenario
from fiberpo_megatron.simulation.world import World
from fiberpo_megatron.sources.engine import EngineSource
from fiberpo_megatron.sources.handover import CUT_S, AllEnded, CutShort, GoesOn, Handover
from fiberpo_megatron.sources.stored import StoredRollouts
from fiberpo_megatron.sources.supply import Supply
from fiberpo_megatron.telemetry.timers import PhaseTimers
from fiberpo_megatron.trainer.loop import Training, train
from fiberpo_megatron.trainer.plugin_checks import make_advantage
from fiberpo_megatron.types import Prompt, RolloutBatch, RolloutGroup, named_arrays
from fiberpo_megatron.weight_sync.base import PublisherContext
from fiberpo_megatron.weight_sync.disk import DiskPublisher

DIGITS = 5
"""Tokens of a prompt: the digits of its number."""
TASKS = VOCABULARY**DIGITS
ENVIRONMENT_S = 0.03
"""Time that the environment works on a trajectory (s)."""


def run_process(world: World) -> None:
    """Run the trainer from the newest checkpoint to its end. Raises what ended it before."""
    scenario, loop = world.scenario, world.begin()
    policy = TablePolicy(lambda: loop.sleep(scenario.train_s))
    saves = Saves(world.folder / "checkpoints", scenario.save_s, lambda: world.now)
    try:
        start = saves.resume(policy)
        world.note("starts", step=start)
        config = _config(scenario, str(world.folder))
        with ExitStack() as stack:
            source = stack.enter_context(_source(world, config, policy, start))
            training = Training(
                policy=policy,
                source=source,
                objective=_objective(),
                advantage=_advantage(scenario, str(world.folder)),
                recorder=source.recorder,
                checkpoints=saves,
                timers=source.timers,
                batch=config.batch,
                algorithm=config.algorithm,
                temperature=1.0,
                steps=scenario.steps,
                save_every=scenario.save_every,
                stop=world.stop,
                max_response_tokens=scenario.response_tokens,
                staleness=scenario.staleness,
            )
            train(training, start)
            invariants.all_steps_trained([step for step, _ in policy.lineage], scenario.steps, world.skipped)
    finally:
        world.end()


@contextmanager
def _source(world: World, config: Config, policy: TablePolicy, start: int) -> Iterator["_WatchedSource"]:
    """Yield the source of rollouts, with the parts that `sources.build` makes."""
    scenario, loop = world.scenario, world.loop
    assert loop is not None
    store = StoredRollouts(config, VOCABULARY, policy.layout, start, resume=world.folder.joinpath("dump").exists())
    with ExitStack() as stack:
        pool = stack.enter_context(
            EnginePool(world.engines.addresses, timeout_s=120.0, transport=world.engines, loop=loop)
        )
        sampler = EngineSampler(
            pool,
            Sampling(max_response_tokens=scenario.response_tokens, stop_token_ids=(0,)),
            max_concurrent=4,
            vocabulary=VOCABULARY,
            segment_tokens=scenario.chunk_tokens,
            silence_s=scenario.silence_s,
        )
        context = PublisherContext(pool, world.model, 0, 1, world.folder, config.weight_sync.timeout_s)
        publisher = stack.enter_context(closing(DiskPublisher(context)))
        fleet = Fleet(policy.layout, pool, world.engines, sampler)
        generator = _WatchedGenerator(
            sampler, [_environment(scenario.turns)], _Digits(), loop, seed=scenario.seed, kept=_keeping(world)
        )
        source = _WatchedSource(
            policy=policy,
            prompts=PromptSets([Domain("digits", 1.0, TASKS, 0)]),
            read=lambda places: [_prompt(place) for place in places],
            generator=generator,
            sampler=sampler,
            publisher=publisher,
            store=store,
            recorder=_Recorder(),
            timers=PhaseTimers(clock=lambda: world.now),
            weight_sync=config.weight_sync,
            seed=scenario.seed,
            prompts_per_step=config.batch.drawn_prompts,
            samples_per_prompt=scenario.samples,
            patience_s=3600.0,
            stop=world.stop,
            pool=pool,
            tickets=Tickets(config.batch.drawn_prompts, scenario.staleness, scenario.steps),
            fleet=fleet,
            filter=_filter(config),
            handover=_handover(scenario, policy, sampler),
            clock=lambda: world.now,
        )
        source.world = world
        yield stack.enter_context(closing(source))


def _handover(scenario: Scenario, policy: TablePolicy, sampler: EngineSampler) -> Callable[[Supply], Handover]:
    if scenario.staleness and scenario.partial == "drain":
        return lambda supply: AllEnded(supply.drain)
    if scenario.staleness and scenario.partial == "segment":
        return lambda supply: CutShort(policy.layout, sampler, lambda: supply.unfinished, CUT_S)
    return lambda supply: GoesOn()


def _filter(config: Config) -> Filter | None:
    batch, filter = config.batch, config.batch.filter
    return None if filter is None else Filter(filter.on, batch.prompts, batch.drawn_prompts, filter.max_refills)


@lru_cache(2)
def _config(scenario: Scenario, folder: str) -> Config:
    batch: dict[str, Any] = {"prompts": scenario.prompts, "samples_per_prompt": scenario.samples}
    if scenario.oversample is not None:
        batch["filter"] = {"oversample": scenario.oversample, "max_refills": scenario.refills, "on": "reward"}
    sections = {
        "run": {"folder": folder, "seed": scenario.seed},
        "model": {"path": "simulated"},
        "environments": [{"name": "digits", "use": "fiberpo_megatron.simulation:Digits"}],
        "trainer": {"steps": scenario.steps},
        "batch": {"micro_batch_tokens": 1024, **batch},
        "evaluation": {"prompts": 0},
        "rollout": {
            "staleness": scenario.staleness,
            "partial": scenario.partial,
            "chunk_tokens": scenario.chunk_tokens,
            "max_response_tokens": scenario.response_tokens,
        },
        "algorithm": {"advantage": {"use": "none", "options": {"normalise_std": False}}},
        "weight_sync": {"method": "disk", "verify_tolerance": 1e-3},
    }
    return Config.model_validate(sections)


@cache
def _objective() -> Objective:
    return build_objective("ppo")


@lru_cache(2)
def _advantage(scenario: Scenario, folder: str) -> AdvantageEstimator:
    return make_advantage(_config(scenario, folder), _objective())


# What is trained on


class _Digits:
    """It is the encoder: the words of the policy are its token ids, and a turn of the environment is one token."""

    def first(
        self, prompt: Prompt, new: str | Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[int, ...]:
        return prompt.token_ids

    def following(
        self,
        prompt: Prompt,
        response_ids: Sequence[int],
        new: str | Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> tuple[int, ...]:
        return (1,)

    def text(self, token_ids: Sequence[int], stop: Sequence[str] = (), special: bool = False) -> str:
        return " ".join(map(str, token_ids))

    def tokens_with(self, characters: Sequence[str]) -> tuple[int, ...]:
        return ()


def _prompt(place: Place) -> Prompt:
    digits = tuple(place.index // VOCABULARY**n % VOCABULARY for n in range(DIGITS))
    return Prompt(place.index, place.domain, digits, str(place.index), Task(str(place.index)), place.split)


def _number(digits: Sequence[int]) -> int:
    """Return the number of the prompt whose tokens these are."""
    return sum(int(digit) * VOCABULARY**n for n, digit in enumerate(digits))


class _Workers:
    """They rate the sum of the first tokens, and take their time."""

    def __init__(self, turns: int) -> None:
        self._turns = turns

    async def tasks(self, split: Split, indices: Sequence[int]) -> list[Task]:
        return [Task(str(index)) for index in indices]

    async def score(
        self, task: Task, turn: Turn, *, seed: int, sample: int | None = None, budget: StepBudget | None = None
    ) -> Outcome | Failure:
        await asyncio.sleep(ENVIRONMENT_S)
        return Outcome(float(sum(turn.token_ids[:2]) % 3))

    async def run(
        self,
        task: Task,
        converse: Callable[[], Say],
        *,
        seed: int,
        sample: int | None = None,
        budget: StepBudget | None = None,
        sampling: Mapping[str, float] | None = None,
    ) -> Outcome | Failure:
        say, reward = converse(), 0.0
        for _ in range(self._turns):
            turn = await say("go on", None, None, None)
            await asyncio.sleep(ENVIRONMENT_S)
            reward += sum(turn.token_ids[:2]) % 3
        return Outcome(reward)

    async def score_group(
        self, task: Task, trajectories: Sequence[EnvironmentTrajectory], *, seed: int, budget: StepBudget | None = None
    ) -> list[Outcome] | Failure:
        raise TypeError("the simulated environment scores every trajectory alone")

    def take_counts(self) -> Mapping[str, int]:
        return {}

    async def close(self) -> None:
        """There is no process to end."""


def _environment(turns: int) -> RunningEnvironment:
    description = Description(
        path="simulated",
        version=None,
        train_size=TASKS,
        held_out_size=0,
        single_turn=turns == 1,
        scores=True,
        scores_groups=False,
        deterministic=True,
        check_all_tasks=False,
        chat_template_kwargs={},
    )
    config = EnvironmentConfig(name="digits", use="fiberpo_megatron.simulation:Digits")
    return RunningEnvironment(config, description, _Workers(turns))


# What watches it


@dataclass(frozen=True)
class _WatchedGenerator(Generator):
    """It tells of the groups that were kept on disk."""

    kept: Callable[[int, int, RolloutGroup], None] = lambda step, number, group: None

    def begin(self, prompts: Mapping[int, Prompt], count: int, sampled: Sampled, keep: Keep | None = None) -> Groups:
        def keep_and_tell(number: int, group: RolloutGroup) -> None:
            if keep is not None and sampled.step is not None:
                keep(number, group)
                self.kept(sampled.step, number, group)

        return super().begin(prompts, count, sampled, keep_and_tell)


def _keeping(world: World) -> Callable[[int, int, RolloutGroup], None]:
    def kept(step: int, number: int, group: RolloutGroup) -> None:
        world.note("kept", step=step, number=number)
        facts = invariants.group_facts(group.trajectories)
        world.kept.setdefault(step, {}).setdefault(group.prompt.index, (world.now, facts))

    return kept


class _Recorder:
    """It looks at the groups that a step trains on."""

    def __init__(self) -> None:
        self.groups: list[RolloutGroup] = []

    def record(self, kind: Any, step: int, metrics: Mapping[str, float]) -> None:
        """The invariants are about no metric."""

    def rollouts(
        self,
        step: int,
        groups: Sequence[RolloutGroup],
        kind: Any = "train",
        *,
        places: Sequence[int] | None = None,
        looked_at: Sequence[RolloutGroup] | None = None,
    ) -> None:
        self.groups = list(groups)

    def evaluation(self, step: int, sets: Mapping[str, Mapping[str, Any]]) -> None:
        """Nothing is evaluated."""

    def stopping(self) -> str | None:
        return None


class _WatchedSource(EngineSource):
    """It checks what a step is about to train on, and notes what was published."""

    world: World

    def take(self, step: int, version: int | None = None) -> RolloutBatch | None:
        world, recorder = self.world, self.recorder
        assert isinstance(recorder, _Recorder)
        recorder.groups = []
        batch = super().take(step, version)
        if batch is not None:
            world.note("taken", step=step, sequences=len(batch.lengths))
            self._check(step, batch, recorder.groups)
        return batch

    def _check(self, step: int, batch: RolloutBatch, groups: Sequence[RolloutGroup]) -> None:
        world, policy = self.world, self.policy
        assert isinstance(policy, TablePolicy)
        filtered = self._supply.filtered if self.filter is not None else None
        begins = batch.offsets[:-1][batch.trajectories == batch.groups.searchsorted(batch.groups[batch.trajectories])]
        found = [_number(batch.tokens[begin : begin + DIGITS].tolist()) for begin in begins]
        places = self.prompts.prompts_at(self.seed, step, self.prompts_per_step)
        if filtered is not None:
            places = [*places, *self.prompts.refills_at(self.seed, step, filtered.drawn - filtered.owned)]
        invariants.lag_bounded(batch, step, world.scenario.staleness)
        invariants.tokens_sampled(batch, world.engines.sampled, world.published)
        invariants.verified_first(batch, world.engines.sampled)
        asked = [place.index for place in places]
        invariants.no_ticket_lost(batch, asked, world.scenario.samples, filtered, found)
        kept = {number: facts for number, (_, facts) in world.kept.get(step, {}).items()}
        invariants.kept_is_used({g.prompt.index: invariants.group_facts(g.trajectories) for g in groups}, kept)
        content = _content(batch)
        invariants.committed_is_used(content, world.committed.get(step), step)
        world.committed[step] = content
        policy.taken = step, found
        if not found:
            world.skipped.add(step)
        invariants.trained_once([*policy.lineage, policy.taken])

    def publish(self, version: int) -> None:
        world, policy = self.world, self.policy
        assert isinstance(policy, TablePolicy)
        named = digest(policy.values)
        world.published.setdefault(str(version), set()).add(named)
        world.digests[version] = named
        if policy.taken is not None and version > policy.taken[0]:  # the step had nothing to train on
            policy.taken = None
        super().publish(version)
        world.note("published", version=version, digest=named)
        for engine in world.engines.engines:
            if engine.version == str(version) and (self._probe is None or (engine.life, named) in world.engines.scored):
                world.engines.verified.add(engine.life)

    def saved(self, done: int) -> None:
        super().saved(done)
        self.world.note("saved", done=done)


def _content(batch: RolloutBatch) -> bytes:
    hashed = blake2b(digest_size=16)
    for name, array in named_arrays(batch).items():
        if name != "engines":
            hashed.update(name.encode() + array.tobytes())
    return hashed.digest()
