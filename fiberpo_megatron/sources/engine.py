"""This module takes rollouts from the engines: with `rollout.staleness` 0 each step is sampled with the weights of the
step before, beyond that trajectories of later steps are made while the trainer trains."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

from fiberpo_megatron.data.prompts import Place, PromptSets
from fiberpo_megatron.engines.busy import Interval, idle_seconds
from fiberpo_megatron.engines.pool import EnginePool
from fiberpo_megatron.engines.registry import SLACK_S
from fiberpo_megatron.evaluation.results import prompt_result
from fiberpo_megatron.evaluation.settings import EvaluationSet
from fiberpo_megatron.interfaces import Evaluated, Policy, Publisher, Recorder, Sampler, SamplingChange
from fiberpo_megatron.rollout.changed_sampler import ChangedSampler
from fiberpo_megatron.rollout.filter import Filter
from fiberpo_megatron.rollout.fleet import FixedFleet, Fleet
from fiberpo_megatron.rollout.generator import Generator, share
from fiberpo_megatron.rollout.tickets import Tickets
from fiberpo_megatron.sources.device_sharing import DeviceSharing, SeparateDevices
from fiberpo_megatron.sources.handover import GoesOn, Handover
from fiberpo_megatron.sources.publication_check import Tolerance, verify_publication
from fiberpo_megatron.sources.step_traces import tail_metrics
from fiberpo_megatron.sources.stored import Store
from fiberpo_megatron.sources.supply import Read, Supply, observed
from fiberpo_megatron.telemetry.timers import PhaseTimers
from fiberpo_megatron.together import together
from fiberpo_megatron.tracks import Track
from fiberpo_megatron.types import RolloutBatch, RolloutGroup
from fiberpo_megatron.weight_sync.settings import WeightSyncConfig


def untraced(step: int, tracks: Sequence[Track]) -> None:
    """Write no trace."""


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
    tickets: Tickets | None = None
    """Which steps may be sampled when; None: the synchronous loop."""
    fleet: Fleet | FixedFleet = field(default_factory=FixedFleet)
    """Which engines belong to the run."""
    filter: Filter | None = None
    """Chooses which groups a step trains on; None: all."""
    handover: Callable[[Supply], Handover] = lambda supply: GoesOn()
    """Makes what takes unfinished trajectories over a publication."""
    counts: Callable[[], Mapping[str, float]] = dict
    """Counts of this rank's environments since the last call, by metric."""
    busy: Callable[[], Mapping[int, Sequence[Interval]]] = dict
    """When each engine, by number, had requests of this rank, since the last call."""
    watch: Callable[[int], Mapping[str, float]] = unwatched
    """Asks the engines how they are after a step, on the rank that logs; returns metrics."""
    traces: Callable[[int, Sequence[Track]], None] = untraced
    """Writes the trace of a step, from the tracks of this rank's trajectories. Every rank calls it."""
    clock: Callable[[], float] = time.monotonic
    """What `patience_s` is measured by, where a filter waits for groups (s)."""
    exact: bool = True
    """Whether trainer and engines compute in float32, so that their log-probs agree."""
    _distrusted: dict[int, str] = field(default_factory=dict, init=False)
    """Engines that are to be quarantined, by number with the reason, as far as this rank knows."""
    _published: int = field(default=0, init=False)
    _probe: RolloutBatch | None = field(default=None, init=False)
    _tracks: Sequence[Track] = field(default=(), init=False)
    """Those of this rank's trajectories of the step that was taken last."""
    _observed: float | None = field(default=None, init=False)
    """When the last step was observed (s since 1970)."""

    def __post_init__(self) -> None:
        self._tolerance = Tolerance(self.weight_sync, self.exact)

    @cached_property
    def _supply(self) -> Supply:
        return Supply(
            layout=self.policy.layout,
            prompts=self.prompts,
            read=self.read,
            generator=self.generator,
            store=self.store,
            recorder=self.recorder,
            timers=self.timers,
            seed=self.seed,
            tickets=self.tickets or Tickets(self.prompts_per_step, 0, sys.maxsize),
            samples_per_prompt=self.samples_per_prompt,
            patience_s=self.patience_s,
            stop=self.stop,
            filter=self.filter,
            clock=self.clock,
        )

    @cached_property
    def _handover(self) -> Handover:
        return self.handover(self._supply)

    @property
    def domains(self) -> Sequence[str]:
        return self.prompts.domains

    def take(self, step: int, version: int | None = None) -> RolloutBatch | None:
        """Return the step's trajectories: each leader generates its share, and every rank gets all of them; or those
        that are on disk. They are sampled with weights `version`, or with those that the tickets allow; then later
        steps that may be sampled already are admitted first. See `interfaces.RolloutSource`."""
        if version is None:
            for admitted in range(step, max(step, self._supply.tickets.admitted(step)) + 1):
                self._supply.admit(admitted)
        else:
            self._supply.admit(step, version)
        rollouts = self._supply.take(step)
        if self.generator is not None:
            self._tracks = self.generator.timeline.take(step)
        if rollouts is not None and len(rollouts.lengths):
            self._probe = rollouts.without_held()
        return rollouts

    @contextmanager
    def training(self, *, publishes: bool) -> Iterator[None]:
        with self._handover.training(publishes=publishes), self.devices.training(publishes=publishes):
            yield

    def publish(self, version: int) -> None:
        """Send the weights to the engines as `version`; then compare what the engines say about a trajectory of the
        last step with what the trainer says."""
        layout, every, patience = (
            self.policy.layout,
            self.weight_sync.verify_every,
            self.weight_sync.timeout_s + SLACK_S,
        )
        with self._handover.publication(), self.timers("publish"), self.fleet.publication():
            while True:  # an engine less each time
                try:
                    with together(layout, f"publishing weights {version}", patience):
                        self.publisher.publish(self.policy.weights, str(version))
                    break
                except Exception as error:
                    if not self.fleet.goes_on_without(error):
                        raise
            self.fleet.published(str(version))
        self._published = version
        failed: Mapping[int, str] = {}
        joining = frozenset(self.fleet.joining)
        if self._probe is not None and (joining or (every and version % every == 0)):
            with self.timers("verify"):
                bound = self._tolerance.bound()
                verified = verify_publication(
                    self.policy, self.sampler, self._probe, self.weight_sync, version, bound, joining
                )
            self._tolerance.measured(verified.mean, version)
            failed = verified.failed
        self.fleet.verified(failed)

    def held_out(self, version: int, of: EvaluationSet | None = None) -> Evaluated | None:
        places = self.prompts.held_out(self.held_out_prompts) if of is None else self.sets[of.name]
        if not places:
            return None
        count = self.held_out_samples if of is None else of.samples
        layout, groups = self.policy.layout, list[RolloutGroup]()
        mine = share(range(len(places)), layout.data_rank, layout.data_size)
        with self.timers("evaluate"):
            prompts = self._supply.read_prompts(places, "reading the held-out tasks")
            with self.timers("evaluate_generate"), together(layout, "generating rollouts", self.patience_s):
                if self.generator is not None:
                    generator = self.generator if of is None else _for_set(self.generator, of)
                    asked = [prompts[index] for index in mine]
                    found = dict(generator.groups(asked, count, str(version), lambda: False, priority=-len(places)))
                    groups = [found[index] for index in range(len(asked))]
            if of is None:
                self.recorder.rollouts(version, groups, "eval")
            rollouts = self._supply.joined(groups, len(places) * count).without_held()
            results = layout.gather_json([prompt_result(group, self._names) for group in groups], root_only=True)
        return Evaluated(rollouts, [result for of_rank in results for result in of_rank])

    @property
    def _names(self) -> Sequence[str]:
        """Names of all environments, on leaders; others have no groups."""
        return () if self.generator is None else [one.config.name for one in self.generator.environments]

    def observe(self, rollouts: RolloutBatch) -> Mapping[str, float]:
        """Move the curriculum, and write the step's trace; return the curriculum's metrics, the counts of all ranks'
        environments, how long the last trajectory was waited for, and how the engines are."""
        totals: dict[str, float] = {}
        busy: dict[str, list[Interval]] = {}
        ended = [track.ended for track in self._tracks if track.ended is not None]
        mine = [{**self.counts(), **self.watch(self._published - 1)}, self.busy(), ended, self._distrusted]
        everywhere = self.policy.layout.gather_json(mine)
        self._distrusted = {}
        for counts, engines, _, _ in everywhere:
            for name, count in counts.items():
                totals[name] = totals.get(name, 0.0) + count
            for engine, intervals in engines.items():  # JSON has made texts of the numbers
                busy.setdefault(engine, []).extend((begin, end) for begin, end in intervals)
        since, self._observed = self._observed, time.time()
        if busy and since is not None:
            idle = [idle_seconds(since, self._observed, intervals) for intervals in busy.values()]
            totals["idle/engine_seconds"] = sum(idle) / len(idle)
        totals |= tail_metrics([ends for _, _, ends, _ in everywhere])
        distrusted = {int(number): why for *_, of_rank in everywhere for number, why in of_rank.items()}
        self.fleet.quarantine(distrusted)
        self.traces(self._published - 1, self._tracks)
        return {**observed(self.prompts, rollouts, self._supply.filtered), **totals}

    def quarantine(self, engines: Sequence[int], why: str) -> None:
        self._distrusted |= dict.fromkeys(engines, why)

    def saved(self, done: int) -> None:
        self.store.saved(done)

    def state(self) -> Mapping[str, object]:
        return self.prompts.state()

    def close(self) -> None:
        """Ask the engines for nothing more. Trajectories that have ended are on disk."""
        self._supply.close()


def _for_set(generator: Generator, of: EvaluationSet) -> Generator:
    """Return what samples as an evaluation set says."""
    change = SamplingChange(of.temperature, of.top_p, of.max_response_tokens)
    if change == SamplingChange():
        return generator
    names = {"temperature": of.temperature, "top_p": of.top_p, "max_tokens": of.max_response_tokens}
    said = {name: value for name, value in names.items() if value is not None}
    sampler = ChangedSampler(generator.sampler, change)
    return replace(generator, sampler=sampler, sampling={**generator.sampling, **said})
