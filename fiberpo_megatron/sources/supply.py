"""This module has the trajectories of the steps that may be sampled already, and gives each step its own."""

import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from fiberpo_megatron.data.prompts import Place, PromptSets
from fiberpo_megatron.interfaces import Layout, Recorder, Segments
from fiberpo_megatron.rollout.filter import Ended, Filter, Filtered, news
from fiberpo_megatron.rollout.finished import FinishedGroups
from fiberpo_megatron.rollout.generator import Generator, Sampled, share
from fiberpo_megatron.rollout.producer import STOP_POLL_S, Groups
from fiberpo_megatron.rollout.tickets import Tickets
from fiberpo_megatron.sources.stored import Store
from fiberpo_megatron.telemetry.timers import PhaseTimers
from fiberpo_megatron.together import together
from fiberpo_megatron.types import Prompt, RolloutBatch, RolloutGroup, flatten, join_batches
from fiberpo_megatron.user_warnings import warn_user

Read = Callable[[Sequence[Place]], list[Prompt]]
"""The prompts at some places; called on leaders only."""


@dataclass
class _Step:
    """A step whose trajectories may be sampled."""

    prompts: Sequence[Prompt]
    """Those of all leaders, on leaders; empty on other ranks."""
    weights: str
    """What the store calls the weights that may sample it."""
    stored: RolloutBatch | None
    """Its trajectories where they were on disk."""
    sampled: Sampled
    """How its trajectories are sampled."""
    refills: Sequence[Prompt] = ()
    """Prompts that may take the places of dropped groups, on leaders; they are read when the first one is needed."""
    kept_refills: MutableMapping[int, RolloutGroup] = field(default_factory=dict)
    """Groups of refills on disk, by index among the refills."""
    finished: dict[int, RolloutGroup] = field(default_factory=dict)
    """This leader's groups that have ended, by index of their prompt; those of refills follow the step's own."""
    groups: list[Groups] = field(default_factory=list)
    """This leader's groups that are being made: those of its tickets, and those of refills; none on other ranks."""
    files: ExitStack = field(default_factory=ExitStack)
    """Closes the files of finished groups."""

    def close(self) -> None:
        for groups in self.groups:
            groups.cancel()
        self.files.close()


@dataclass
class Supply:
    """It admits steps in order, has their trajectories made beside the training, and hands them out step by step.

    Every rank makes one and calls its methods alike: the leaders of data-parallel replicas make the trajectories of
    their share of the prompts, and every rank gets all of them. No rank waits for trajectories inside a collective.
    Close it when the run ends: what is unfinished is no longer asked for, and what has ended is on disk.
    """

    layout: Layout
    prompts: PromptSets
    read: Read
    generator: Generator | None
    """None on ranks that do not lead a data-parallel replica: they generate nothing."""
    store: Store
    recorder: Recorder
    timers: PhaseTimers
    seed: int
    tickets: Tickets
    samples_per_prompt: int
    patience_s: float
    """Seconds for which ranks wait for those that generate a step's trajectories."""
    stop: Callable[[], bool]
    """Whether this rank was asked to stop."""
    filter: Filter | None = None
    """Chooses which groups a step trains on; None: all."""
    clock: Callable[[], float] = time.monotonic
    """What `patience_s` is measured by (s)."""
    filtered: Filtered | None = field(default=None, init=False)
    """What the filter saw of the step that was taken last."""
    _steps: dict[int, _Step] = field(default_factory=dict, init=False)

    def admit(self, step: int, version: int | None = None) -> None:
        """Let the trajectories of a step be sampled, if they are not yet: with weights `version`, where given, else
        with those of the versions that its tickets allow."""
        if step in self._steps:
            return
        places = self.prompts.prompts_at(self.seed, step, self.tickets.per_step)
        prompts = self.read_prompts(places, f"reading the tasks of step {step}")
        versions = self.tickets.versions(step) if version is None else range(version, version + 1)
        weights = str(versions[-1]) if len(versions) == 1 else f"{versions[0]} to {versions[-1]}"
        with self.timers("stored_rollouts"):
            stored = self.store.load(step, prompts, weights)
        name = str(step if version is None else version)
        sampled = Sampled(name, frozenset(map(str, versions)), self.tickets.of_step(step)[0], step=step)
        admitted = self._steps[step] = _Step(prompts, weights, stored, sampled)
        if stored is None:
            with together(self.layout, f"looking for finished groups of step {step}"):
                if self.generator is not None:
                    self._begin(self.generator, admitted, step)

    def _begin(self, generator: Generator, admitted: _Step, step: int) -> None:
        """Begin to make this leader's groups that are not on disk."""
        mine = self._mine(range(self.tickets.per_step))
        kept = admitted.files.enter_context(self.store.unfinished(step, admitted.prompts, admitted.weights, mine))
        admitted.finished = {index: kept[index] for index in mine if index in kept}
        missing = {index: admitted.prompts[index] for index in mine if index not in kept}
        sampled = replace(admitted.sampled, segments=_segments(kept))
        admitted.groups.append(generator.begin(missing, self.samples_per_prompt, sampled, kept.__setitem__))

    def _mine(self, indices: range) -> Sequence[int]:
        """Which of these prompts of a step are this leader's."""
        return share(indices, self.layout.data_rank, self.layout.data_size)

    def take(self, step: int) -> RolloutBatch | None:
        """Return the trajectories of an admitted step, equal on every rank; None when a request to stop came first."""
        admitted = self._steps[step]
        rollouts = admitted.stored
        if rollouts is None:
            rollouts = self._made(admitted, step) if self.filter is None else self._chosen(self.filter, admitted, step)
            if rollouts is None:
                return None
            with self.timers("stored_rollouts"):
                self.store.save(step, admitted.prompts, admitted.weights, rollouts, self.filtered)
        elif self.filter is not None:
            self.filtered = self.store.filtered(step)
        del self._steps[step]
        return rollouts

    def _made(self, admitted: _Step, step: int) -> RolloutBatch | None:
        mine = self._mine(range(self.tickets.per_step))
        complete: list[RolloutGroup] = []
        with self.timers("generate"), together(self.layout, "generating rollouts", self.patience_s):
            for groups in admitted.groups:
                admitted.finished.update(groups.finished(self.stop))
            if admitted.groups:
                complete = [admitted.finished[index] for index in mine if index in admitted.finished]
        if self.layout.any_rank(bool(admitted.groups) and len(complete) < len(mine)):
            self.close()  # a run that stops has its engines idle, so that it can save
            return None
        admitted.close()
        self.recorder.rollouts(step, complete)
        return self.joined(complete, self.tickets.per_step * self.samples_per_prompt)

    def _chosen(self, filter: Filter, admitted: _Step, step: int) -> RolloutBatch | None:
        """Return the useful groups that the step trains on, in their order. The leaders tell each other which groups
        have ended, as they end, and draw a refill as soon as it is needed in any case. What comes behind the last
        chosen group is aborted."""
        ended: dict[int, Ended] = {}
        parts = [range(filter.owned)]
        """Numbers of the groups that were begun together."""
        with self.timers("generate"):
            until = self.clock() + self.patience_s
            while not (choice := filter.choose(ended, parts[-1].stop)).certain:
                if choice.refills:
                    parts.append(range(parts[-1].stop, parts[-1].stop + choice.refills))
                    self._refill(filter, admitted, step, parts[-1])
                with together(self.layout, "generating rollouts"):
                    new = self._news(filter, admitted, ended)
                    if self.clock() > until:
                        raise TimeoutError(self._late(step, ended, parts[-1].stop))
                rows = self.layout.gather_json([self.stop(), [[number, *facts] for number, facts in new.items()]])
                ended |= news(row for _, found in rows for row in found)
                if any(stopping for stopping, _ in rows) and not filter.choose(ended, parts[-1].stop).certain:
                    self.close()  # a run that stops has its engines idle, so that it can save
                    return None
        admitted.close()
        self.filtered = Filtered.of(filter, ended, choice, parts[-1].stop)
        if not self.filtered.answers:
            raise _all_dropped(parts[-1].stop * self.samples_per_prompt)
        self._record(admitted, step, choice.chosen, choice.looked_at)
        if not choice.chosen and self.layout.is_logger:
            warn_user(
                f"step {step}: in none of its {parts[-1].stop} groups, {parts[-1].stop - filter.owned} refills among "
                f'them, does what batch.filter.on = "{filter.on}" looks at differ, so that the step trains on nothing; '
                "choose easier or harder prompts, or raise batch.samples_per_prompt or batch.filter.max_refills"
            )
        wanted = [[number for number in part if number in choice.chosen] for part in parts]
        joined = [
            self._gathered([admitted.finished[number] for number in numbers if number in admitted.finished])
            for numbers in wanted
            if numbers
        ]
        return join_batches(joined) if joined else flatten([])

    def _refill(self, filter: Filter, admitted: _Step, step: int, part: range) -> None:
        """Begin to make the groups of refills, which go before all tickets: the step waits for nothing else. With the
        first one all tasks are read, and what is on disk: which leader makes a refill is a matter of timing."""
        owned, first = filter.owned, part.start == filter.owned
        if first:
            places = self.prompts.refills_at(self.seed, step, filter.most_refills)
            admitted.refills = self.read_prompts(places, f"reading further tasks of step {step}")
        with together(self.layout, f"looking for finished groups of step {step}"):
            if self.generator is None:
                return
            if first:
                prompts, any_of_them = admitted.prompts, range(filter.most_refills)
                unfinished = self.store.unfinished(step, prompts, admitted.weights, any_of_them, admitted.refills)
                admitted.kept_refills = admitted.files.enter_context(unfinished)
            kept, asked = admitted.kept_refills, [number - owned for number in self._mine(part)]
            admitted.finished |= {owned + index: kept[index] for index in asked if index in kept}
            missing = {owned + index: admitted.refills[index] for index in asked if index not in kept}
            name, priority = f"{admitted.sampled.name} refill", admitted.sampled.priority - owned - filter.most_refills
            sampled = replace(  # a prompt may come twice: other samples
                admitted.sampled, name=name, priority=priority, segments=_segments(kept)
            )

            def keep(number: int, group: RolloutGroup) -> None:
                kept[number - owned] = group

            admitted.groups.append(self.generator.begin(missing, self.samples_per_prompt, sampled, keep))

    def _news(self, filter: Filter, admitted: _Step, ended: Mapping[int, Ended]) -> dict[int, Ended]:
        """Return this leader's groups that have ended and are not in `ended`, by number; it waits a moment for the
        first."""

        def new() -> dict[int, RolloutGroup]:
            for groups in admitted.groups:
                admitted.finished.update(groups.ended())
            return {number: group for number, group in admitted.finished.items() if number not in ended}

        found = new()
        if not found and self.generator is not None and not self.stop():
            self.generator.loop.wait([groups.news for groups in admitted.groups], STOP_POLL_S)
            found = new()
        return {number: filter.ended(group) for number, group in found.items()}

    def _late(self, step: int, ended: Mapping[int, Ended], drawn: int) -> str:
        """Return the message about groups that take too long."""
        late = [number for number in range(drawn) if number not in ended]
        return (
            f"step {step}: {len(late)} of {drawn} groups have not ended {self.patience_s:g} s after the step's turn "
            f"came (rollout.step_timeout_s), the first of them number {late[0]}; see the engines' logs and the "
            "environments', or raise rollout.step_timeout_s"
        )

    def _record(self, admitted: _Step, step: int, chosen: Sequence[int], looked_at: int) -> None:
        """Write what the step trains on for people, and count what was solved."""
        mine = sorted(admitted.finished)
        self.recorder.rollouts(
            step,
            [admitted.finished[number] for number in mine if number in chosen],
            places=[chosen.index(number) for number in mine if number in chosen],
            looked_at=[admitted.finished[number] for number in mine if number < looked_at],
        )

    def joined(self, groups: Sequence[RolloutGroup], asked: int) -> RolloutBatch:
        """Return all leaders' groups on every rank. `asked`: trajectories that were asked for, all ranks together."""
        rollouts = self._gathered(groups)
        if not len(rollouts.lengths):
            raise _all_dropped(asked)
        return rollouts

    def _gathered(self, groups: Sequence[RolloutGroup]) -> RolloutBatch:
        with self.timers("exchange"):
            return self.layout.gather_rollouts(flatten(groups) if self.layout.is_leader else None)

    @property
    def unfinished(self) -> bool:
        """This says whether trajectories of any rank may be in the making; it is the same on every rank."""
        return any(step.stored is None for step in self._steps.values())

    def drain(self) -> None:
        """Wait until all admitted trajectories have ended. A request to stop ends the wait, and the trajectories."""
        with self.timers("drain"), together(self.layout, "waiting for all trajectories to end", self.patience_s):
            for admitted in self._steps.values():
                if not all(groups.wait(self.stop) for groups in admitted.groups):
                    admitted.close()

    def close(self) -> None:
        """Ask for nothing more; idempotent."""
        for admitted in self._steps.values():
            admitted.close()
        self._steps.clear()

    def read_prompts(self, places: Sequence[Place], what: str) -> list[Prompt]:
        """Return the prompts at some places on leaders, and nothing on other ranks. Every rank calls it."""
        with self.timers("tasks"), together(self.layout, what):
            return self.read(places) if self.layout.is_leader else []


def observed(prompts: PromptSets, rollouts: RolloutBatch, filtered: Filtered | None) -> dict[str, float]:
    """Let a curriculum see a step, with the groups that a filter has dropped; return the metrics of both."""
    if filtered is None:
        return dict(prompts.observe(rollouts))
    return {**prompts.observe(rollouts, filtered.solved), **filtered.metrics()}


def _segments(kept: Mapping[int, RolloutGroup]) -> Segments | None:
    """Return what keeps the segments of the groups that have not ended; None when nothing is kept on disk."""
    return kept if isinstance(kept, FinishedGroups) else None


def _all_dropped(asked: int) -> RuntimeError:
    return RuntimeError(
        f"all {asked} trajectories were dropped, because their environments failed; see the files in "
        "<run folder>/environments"
    )
