"""This module has the trajectories of the steps that may be sampled already, and gives each step its own."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from fiberpo_megatron.data.prompts import Place, PromptSets
from fiberpo_megatron.interfaces import Layout, Recorder
from fiberpo_megatron.rollout.generator import Generator, Sampled, share
from fiberpo_megatron.rollout.producer import Groups
from fiberpo_megatron.rollout.tickets import Tickets
from fiberpo_megatron.sources.stored import Store
from fiberpo_megatron.telemetry.timers import PhaseTimers
from fiberpo_megatron.together import together
from fiberpo_megatron.types import Prompt, RolloutBatch, RolloutGroup, flatten

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
    finished: dict[int, RolloutGroup] = field(default_factory=dict)
    """This leader's groups that have ended, by index of their prompt."""
    groups: Groups | None = None
    """This leader's groups that are being made; None on other ranks."""
    files: ExitStack = field(default_factory=ExitStack)
    """Closes the files of finished groups."""

    def close(self) -> None:
        if self.groups is not None:
            self.groups.cancel()
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
        admitted = self._steps[step] = _Step(prompts, weights, stored)
        if stored is None:
            name = str(step if version is None else version)
            sampled = Sampled(name, frozenset(map(str, versions)), self.tickets.of_step(step)[0])
            with together(self.layout, f"looking for finished groups of step {step}"):
                if self.generator is not None:
                    self._begin(self.generator, admitted, step, sampled)

    def _begin(self, generator: Generator, admitted: _Step, step: int, sampled: Sampled) -> None:
        """Begin to make this leader's groups that are not on disk."""
        mine = self._mine
        kept = admitted.files.enter_context(self.store.unfinished(step, admitted.prompts, admitted.weights, mine))
        admitted.finished = {index: kept[index] for index in mine if index in kept}
        missing = {index: admitted.prompts[index] for index in mine if index not in kept}
        admitted.groups = generator.begin(missing, self.samples_per_prompt, sampled, kept.__setitem__)

    @property
    def _mine(self) -> Sequence[int]:
        """The indices of this leader's prompts in a step."""
        return share(range(self.tickets.per_step), self.layout.data_rank, self.layout.data_size)

    def take(self, step: int) -> RolloutBatch | None:
        """Return the trajectories of an admitted step, equal on every rank; None when a request to stop came first."""
        admitted = self._steps[step]
        rollouts = admitted.stored
        if rollouts is None:
            rollouts = self._made(admitted, step)
            if rollouts is None:
                return None
            with self.timers("stored_rollouts"):
                self.store.save(step, admitted.prompts, admitted.weights, rollouts)
        del self._steps[step]
        return rollouts

    def _made(self, admitted: _Step, step: int) -> RolloutBatch | None:
        mine = self._mine
        complete: list[RolloutGroup] = []
        with self.timers("generate"), together(self.layout, "generating rollouts", self.patience_s):
            if admitted.groups is not None:
                admitted.finished.update(admitted.groups.finished(self.stop))
                complete = [admitted.finished[index] for index in mine if index in admitted.finished]
        if self.layout.any_rank(admitted.groups is not None and len(complete) < len(mine)):
            self.close()  # a run that stops has its engines idle, so that it can save
            return None
        admitted.close()
        self.recorder.rollouts(step, complete)
        return self.joined(complete, self.tickets.per_step * self.samples_per_prompt)

    def joined(self, groups: Sequence[RolloutGroup], asked: int) -> RolloutBatch:
        """Return all leaders' groups on every rank. `asked`: trajectories that were asked for, all ranks together."""
        with self.timers("exchange"):
            mine = flatten(groups) if self.layout.is_leader else None
            rollouts = self.layout.gather_rollouts(mine)
        if not len(rollouts.lengths):
            raise RuntimeError(
                f"all {asked} trajectories were dropped, because their environments failed; see the files in "
                "<run folder>/environments"
            )
        return rollouts

    @property
    def unfinished(self) -> bool:
        """This says whether trajectories of any rank may be in the making; it is the same on every rank."""
        return any(step.stored is None for step in self._steps.values())

    def drain(self) -> None:
        """Wait until all admitted trajectories have ended. A request to stop ends the wait, and the trajectories."""
        with self.timers("drain"), together(self.layout, "waiting for all trajectories to end", self.patience_s):
            for admitted in self._steps.values():
                if admitted.groups is not None and not admitted.groups.wait(self.stop):
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
