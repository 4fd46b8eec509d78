"""This module takes rollouts from the engines, in step with the training: each step is sampled with the weights of the
step before."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

from fiberpo_megatron.data.prompts import Place, PromptSets
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.engines.registry import SLACK_S
from fiberpo_megatron.evaluation.results import prompt_result
from fiberpo_megatron.evaluation.settings import EvaluationSet
from fiberpo_megatron.interfaces import Evaluated, Policy, Publisher, Recorder, Sampler, SamplingChange
from fiberpo_megatron.rollout.generator import Generator, share
from fiberpo_megatron.rollout.sampler import ChangedSampler
from fiberpo_megatron.sources.device_sharing import DeviceSharing, SeparateDevices
from fiberpo_megatron.sources.publication_check import Tolerance, verify_publication
from fiberpo_megatron.telemetry.timers import PhaseTimers
from fiberpo_megatron.together import together
from fiberpo_megatron.types import Prompt, RolloutBatch, RolloutGroup, flatten
from fiberpo_megatron.weight_sync.settings import WeightSyncConfig

Read = Callable[[Sequence[Place]], list[Prompt]]
"""The prompts at some places; called on leaders only."""


class Store(Protocol):
    """It keeps rollouts on disk. Every rank calls it; `unfinished` is for leaders alone."""

    def load(self, step: int, prompts: Sequence[Prompt], weights: str) -> RolloutBatch | None:
        """Return the step's trajectories, equal on every rank, where they need not be generated. Raises when they are
        to be replayed and cannot be."""
        ...

    def save(self, step: int, prompts: Sequence[Prompt], weights: str, batch: RolloutBatch) -> None:
        """Keep trajectories that were just generated."""
        ...

    def unfinished(
        self, step: int, prompts: Sequence[Prompt], weights: str, mine: Sequence[int]
    ) -> AbstractContextManager[MutableMapping[int, RolloutGroup]]:
        """Give the finished groups of a step whose generation was cut short, by index of their prompt, as far as they
        are among `mine`. What is put into the mapping is kept for a resume."""
        ...

    def saved(self, done: int) -> None:
        """Note that a checkpoint holds the first `done` steps."""
        ...


def unwatched(step: int) -> Mapping[str, float]:
    """Return no metrics: another rank asks the engines how they are."""
    return {}


@dataclass
class EngineSource:
    """It implements `interfaces.RolloutSource` with engines that serve the policy's latest weights."""

    policy: Policy
    prompts: PromptSets
    read: Read
    generator: Generator | None
    """None on ranks that do not lead a data-parallel replica: they generate nothing."""
    sampler: Sampler
    publisher: Publisher
    store: Store
    recorder: Recorder
    timers: PhaseTimers
    weight_sync: WeightSyncConfig
    seed: int
    prompts_per_step: int
    samples_per_prompt: int
    patience_s: float = 14400.0
    """Seconds for which ranks wait for those that generate a step's trajectories (`rollout.step_timeout_s`)."""
    held_out_prompts: int = 0
    held_out_samples: int = 1
    sets: Mapping[str, Sequence[Place]] = field(default_factory=dict)
    """The places of each evaluation set."""
    stop: Callable[[], bool] = lambda: False
    """Whether this rank was asked to stop."""
    devices: DeviceSharing = SeparateDevices()
    pool: EnginePool | None = None
    """The engines; None when they are no SGLang servers."""
    counts: Callable[[], Mapping[str, float]] = dict
    """Counts of this rank's environments since the last call, by metric."""
    watch: Callable[[int], Mapping[str, float]] = unwatched
    """Asks the engines how they are after a step, on the rank that logs; returns metrics."""
    exact: bool = True
    """Whether trainer and engines compute in float32, so that their log-probs agree."""
    _published: int = field(default=0, init=False)
    _probe: RolloutBatch | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._tolerance = Tolerance(self.weight_sync, self.exact)

    @property
    def domains(self) -> Sequence[str]:
        return self.prompts.domains

    def take(self, step: int, version: int | None = None) -> RolloutBatch | None:
        """Return the step's trajectories, sampled with weights `version` (by default `step`): each leader generates its
        share, and every rank gets all of them; or those that are on disk. See `interfaces.RolloutSource`."""
        version = step if version is None else version
        places = self.prompts.prompts_at(self.seed, step, self.prompts_per_step)
        prompts = self._read(places, f"reading the tasks of step {step}")
        with self.timers("stored_rollouts"):
            rollouts = self.store.load(step, prompts, str(version))
        if rollouts is None:
            rollouts = self._generated(prompts, len(places), version, step)
            if rollouts is None:
                return None
            with self.timers("stored_rollouts"):
                self.store.save(step, prompts, str(version), rollouts)
        self._probe = rollouts.without_held()
        return rollouts

    def training(self, *, publishes: bool) -> AbstractContextManager[None]:
        return self.devices.training(publishes=publishes)

    def publish(self, version: int) -> None:
        """Send the weights to the engines as `version`; then compare what the engines say about a trajectory of the
        last step with what the trainer says."""
        layout, every, patience = (
            self.policy.layout,
            self.weight_sync.verify_every,
            self.weight_sync.timeout_s + SLACK_S,
        )
        with self.timers("publish"), together(layout, f"publishing weights {version}", patience):
            self.publisher.publish(self.policy.weights, str(version))
        self._published = version
        if self._probe is not None and every and version % every == 0:
            with self.timers("verify"):
                bound = self._tolerance.bound()
                mean = verify_publication(self.policy, self.sampler, self._probe, self.weight_sync, version, bound)
            self._tolerance.measured(mean, version)

    def held_out(self, version: int, of: EvaluationSet | None = None) -> Evaluated | None:
        places = self.prompts.held_out(self.held_out_prompts) if of is None else self.sets[of.name]
        if not places:
            return None
        count = self.held_out_samples if of is None else of.samples
        layout, groups = self.policy.layout, list[RolloutGroup]()
        mine = share(range(len(places)), layout.data_rank, layout.data_size)
        with self.timers("evaluate"):
            prompts = self._read(places, "reading the held-out tasks")
            with self.timers("evaluate_generate"), together(layout, "generating rollouts", self.patience_s):
                if self.generator is not None:
                    generator = self.generator if of is None else _for_set(self.generator, of)
                    asked = [prompts[index] for index in mine]
                    found = dict(generator.groups(asked, count, str(version), lambda: False))
                    groups = [found[index] for index in range(len(asked))]
            if of is None:
                self.recorder.rollouts(version, groups, "eval")
            rollouts = self._joined(groups, len(places) * count).without_held()
            results = layout.gather_json([prompt_result(group, self._names) for group in groups], root_only=True)
        return Evaluated(rollouts, [result for of_rank in results for result in of_rank])

    @property
    def _names(self) -> Sequence[str]:
        """Names of all environments, on leaders; others have no groups."""
        return () if self.generator is None else [one.config.name for one in self.generator.environments]

    def observe(self, rollouts: RolloutBatch) -> Mapping[str, float]:
        """Move the curriculum; return its metrics, the counts of all ranks' environments, and how the engines are."""
        totals: dict[str, float] = {}
        for counts in self.policy.layout.gather_json(dict(self.counts())):
            for name, count in counts.items():
                totals[name] = totals.get(name, 0.0) + count
        return {**self.prompts.observe(rollouts), **totals, **self.watch(self._published - 1)}

    def saved(self, done: int) -> None:
        self.store.saved(done)

    def state(self) -> Mapping[str, object]:
        return self.prompts.state()

    def _read(self, places: Sequence[Place], what: str) -> list[Prompt]:
        """The prompts on leaders, nothing on other ranks."""
        with self.timers("tasks"), together(self.policy.layout, what):
            return self.read(places) if self.policy.layout.is_leader else []

    def _generated(self, prompts: Sequence[Prompt], total: int, version: int, step: int) -> RolloutBatch | None:
        """Sample, score and join the trajectories of a step; None when a request to stop came first."""
        layout = self.policy.layout
        mine = share(range(total), layout.data_rank, layout.data_size)
        groups: list[RolloutGroup | None] = []
        with self.timers("generate"), together(layout, "generating rollouts", self.patience_s):
            if layout.is_leader:
                groups = self._groups(prompts, version, mine, step)
        complete = [group for group in groups if group is not None]
        if layout.any_rank(len(complete) < len(groups)):
            return None
        self.recorder.rollouts(step, complete)
        return self._joined(complete, total * self.samples_per_prompt)

    def _joined(self, groups: Sequence[RolloutGroup], asked: int) -> RolloutBatch:
        """All leaders' groups on every rank. `asked`: trajectories that were asked for, all ranks together."""
        layout = self.policy.layout
        with self.timers("exchange"):
            share = flatten(groups) if layout.is_leader else None
            rollouts = layout.gather_rollouts(share)
        if not len(rollouts.lengths):
            raise RuntimeError(
                f"all {asked} trajectories were dropped, because their environments failed; see the files in "
                "<run folder>/environments"
            )
        return rollouts

    def _groups(
        self, prompts: Sequence[Prompt], version: int, mine: Sequence[int], step: int
    ) -> list[RolloutGroup | None]:
        """This leader's groups; None for those that a request to stop cut short."""
        assert self.generator is not None, "leaders have a generator"
        with self.store.unfinished(step, prompts, str(version), mine) as finished:
            missing = [index for index in mine if index not in finished]
            asked = [prompts[index] for index in missing]
            for i, group in self.generator.groups(asked, self.samples_per_prompt, str(version), self.stop):
                finished[missing[i]] = group
            return [finished.get(index) for index in mine]


def _for_set(generator: Generator, of: EvaluationSet) -> Generator:
    """Return what samples as an evaluation set says."""
    change = SamplingChange(of.temperature, of.top_p, of.max_response_tokens)
    if change == SamplingChange():
        return generator
    names = {"temperature": of.temperature, "top_p": of.top_p, "max_tokens": of.max_response_tokens}
    said = {name: value for name, value in names.items() if value is not None}
    sampler = ChangedSampler(generator.sampler, change)
    return replace(generator, sampler=sampler, sampling={**generator.sampling, **said})
